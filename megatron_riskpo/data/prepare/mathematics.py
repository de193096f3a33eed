"""Mathematics: where the problem stands and how its answer is found."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_riskpo.data.prepare.recipe import Entry, Recipe, Unusable, answer_text, first
from megatron_riskpo.rewards.answers import final_answer

PROBLEM = ("problem", "question", "Problem", "Question")
ANSWER = ("answer", "Answer", "expected_answer")
SOLUTION = ("solution", "Solution")
# DAPO's file wraps every problem; its answers stand behind "Answer:", which our prompts do not ask for.
DAPO_HEAD = re.compile(r"\ASolve the following math problem step by step\..*?\n\n", re.DOTALL)
DAPO_TAIL = re.compile(r"\s*Remember to put your answer on its own line after \"Answer:\"\.\s*\Z")

Convert = Callable[[Mapping[str, Any]], Entry]


def gsm8k(row: Mapping[str, Any]) -> Entry:
    """The answer stands behind #### at the end of the solution, with commas in thousands."""
    solution, found, answer = str(row["answer"]).rpartition("####")
    if not found:
        raise Unusable("no #### in the answer")
    return {
        "problem": row["question"],
        "expected_answer": answer.strip().replace(",", ""),
        # The marks of GSM8K's calculator are for models that have one.
        "reference_solution": re.sub(r"<<[^>]*>>", "", solution).strip(),
    }


def answer_or_box(row: Mapping[str, Any]) -> Entry:
    """An answer column where there is one, else the last box of the solution."""
    solution = first(row, SOLUTION)
    value = first(row, ANSWER)
    if value is None:
        if not isinstance(solution, str) or "\\boxed" not in solution:
            raise Unusable("neither an answer nor a box in the solution")
        value = final_answer(solution)
    entry = {"problem": first(row, PROBLEM), "expected_answer": answer_text(value)}
    return {**entry, "reference_solution": solution} if isinstance(solution, str) and solution.strip() else entry


def dapo(row: Mapping[str, Any]) -> Entry:
    """The problem without its wrapping."""
    text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    problem = DAPO_TAIL.sub("", DAPO_HEAD.sub("", text))
    return {"problem": problem, "expected_answer": answer_text(row["reward_model"]["ground_truth"])}


def olympiad_bench(row: Mapping[str, Any]) -> Entry:
    """Questions of text with one final answer; proofs and figures cannot be graded by it."""
    if row.get("modality") not in (None, "Text-only"):
        raise Unusable("needs a figure")
    if not row.get("final_answer"):
        raise Unusable("a proof, no answer")
    context = str(row.get("context") or "").strip()
    problem = f"{context}\n\n{row['question']}" if context else row["question"]
    entry: Entry = {"problem": problem, "expected_answer": answer_text(row["final_answer"])}
    return {**entry, "unit": row["unit"]} if row.get("unit") else entry


MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"),
    "precalculus",
)


def _plain(
    repository: str, split: str = "test", carried: tuple[str, ...] = (), configs: tuple[str | None, ...] = (None,)
) -> Recipe:
    return Recipe(answer_or_box, (PROBLEM, ANSWER + SOLUTION), (repository, configs, split), carried)


RECIPES: dict[str, Recipe] = {
    "gsm8k": Recipe(gsm8k, (("question",), ("answer",)), ("openai/gsm8k", ("main",), "test")),
    "math": _plain("EleutherAI/hendrycks_math", "train", ("level", "type"), MATH_SUBJECTS),
    "math500": _plain("HuggingFaceH4/MATH-500", carried=("level", "subject", "unique_id")),
    "dapo_math_17k": Recipe(
        dapo, (("prompt",), ("reward_model",)), ("BytedTsinghua-SIA/DAPO-Math-17k", (None,), "train")
    ),
    "aime24": _plain("HuggingFaceH4/aime_2024", "train", ("year", "url")),
    "aime25": _plain("math-ai/aime25"),
    "amc": _plain("AI-MO/aimo-validation-amc", "train", ("url",)),
    "minerva": _plain("math-ai/minervamath"),
    "olympiad_bench": Recipe(
        olympiad_bench, (("question",), ("final_answer",)), ("Hothan/OlympiadBench", ("OE_TO_maths_en_COMP",), "train"),
        ("subfield", "difficulty", "answer_type"),
    ),
}  # fmt: skip
