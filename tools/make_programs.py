"""Questions of a tiny program-synthesis task, and of a mixture with sums, for the code quick start.

    python tools/make_programs.py runs/programs

A question shows a function's values at three places ("0:3 1:5 4:11"); the answer is the Python expression that
`def f(x): return ...` needs (2*x+3). What is checked are the values at other places, in the sandbox, so that any
expression of the same function is right. Writes into the folder

    programs.jsonl       questions, with tests
    mixed.jsonl          the same, and as many sums ("4+7-2="), graded as mathematics
    mixed_held_out.jsonl those of the mixture that no run trains on, for riskpo evaluate
    mixed_sft.jsonl      solved examples of both, each in three forms of which one is what RL will check: like a real
                         base model, one that learns from them knows more than it shows
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

from megatron_riskpo.data.questions import is_held_out

TEMPLATE = "def f(x):\n    return {program}"
TESTED = (2, 3, 7, -4)
NUM_SUMS = 1440
FORMS = {
    # form of the answer that is checked first: a product without its sign is no Python
    "programs": ("{python}", "{mathematics}", "y={python}"),
    "sums": ("\\boxed{{{answer}}}", "{answer}", "{answer}."),
}


def programs() -> Iterator[dict]:
    """Every a*x+b and a*x*x+b with 1 <= a <= 9 and 0 <= b <= 9, with each third place."""
    for a, b, power, place in product(range(1, 10), range(10), (1, 2), range(2, 10)):
        shown = " ".join(f"{x}:{a * x**power + b}" for x in (0, 1, place))
        yield {
            "problem": shown,
            "expected_answer": f"{a}*{'*'.join('x' * power)}+{b}",
            "source": "programs",
            "grader": "code",
            "entry_point": "f",
            "program_template": TEMPLATE,
            "tests": [{"args": [x], "expected": a * x**power + b} for x in TESTED],
        }


def sums(rng: random.Random) -> Iterator[dict]:
    """Different sums and differences of three one-digit numbers."""
    every = [f"{a}{s}{b}{t}{c}" for a, s, b, t, c in product(range(10), "+-", range(10), "+-", range(10))]
    for text in rng.sample(every, NUM_SUMS):
        value = sum(int(number) for number in text.replace("-", "+-").split("+"))
        yield {"problem": f"{text}=", "expected_answer": str(value), "source": "sums", "grader": "math"}


def solved(question: dict) -> Iterator[dict]:
    """The question with a solution in each form."""
    answer = question["expected_answer"]
    written = answer.replace("x*x", "x^2").replace("*", "")
    for form in FORMS[question["source"]]:
        solution = form.format(answer=answer, python=answer, mathematics=written)
        yield {**{key: question[key] for key in ("problem", "expected_answer", "source")}, "solution": solution}


def write(path: Path, questions: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    code = list(programs())
    mixed = [*code, *sums(random.Random(1))]
    # Runs take their held-out questions from the file's beginning: these should be of all kinds.
    for questions in (code, mixed):
        random.Random(2).shuffle(questions)
    write(folder / "programs.jsonl", code)
    write(folder / "mixed.jsonl", mixed)
    write(folder / "mixed_held_out.jsonl", (question for question in mixed if is_held_out(question["problem"])))
    write(folder / "mixed_sft.jsonl", (example for question in mixed for example in solved(question)))


if __name__ == "__main__":
    main()
