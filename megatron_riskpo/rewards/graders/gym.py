"""reasoning-gym's own verifiers: several right answers, and scores between 0 and 1."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_riskpo.rewards.answers import final_answer
from megatron_riskpo.rewards.reference import AnswerForm

# Verifiers of reasoning-gym 0.1.25 that evaluate the answer as Python code. They only get to see what these patterns
# match: text of which Python can make nothing but numbers, words and lists of them.
ARITHMETIC = re.compile(r"[0-9+\-*/(). \t]{0,200}")
LISTS = re.compile(r"[\[\](), \t\n0-9.-]*|[\[\], \t\n'\"A-Za-z0-9_.-]*")
ALGEBRA = re.compile(
    r"(?:\b(?:[a-zA-Z]|pi|sin|cos|tan|exp|log|sqrt)\b|(?<![a-zA-Z])[0-9]++(?:\.[0-9]*+)?|[+\-*/^() \t])*+"
)
EVALUATING = {
    "binary_matrix": LISTS, "n_queens": LISTS, "spiral_matrix": LISTS, "string_insertion": LISTS,
    "countdown": ARITHMETIC, "puzzle24": ARITHMETIC,
    "simple_integration": ALGEBRA, "intermediate_integration": ALGEBRA, "polynomial_multiplication": ALGEBRA,
}  # fmt: skip
CANNOT_READ = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class GymGrader:
    """The score of the task's own verifier on the final answer; without a stated answer, on the whole response. Its
    fields gym_task and gym_entry are there where data.train is "reasoning_gym:NAME". An answer that a verifier would
    run as code is 0.0 unseen; 0.0, too, is one that it fails to read (some raise where others give 0)."""

    form: AnswerForm = "any"

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        from reasoning_gym.factory import get_score_answer_fn

        task, entry = fields["gym_task"], fields["gym_entry"]
        answer = final_answer(response, self.form)
        if self.form == "any" and "\\boxed" not in response and "answer" not in response.lower():
            answer = response.strip()
        allowed = EVALUATING.get(task)
        if answer is None or (allowed is not None and not allowed.fullmatch(answer)):
            return 0.0
        score: Any = get_score_answer_fn(task)
        try:
            return float(score(answer, entry))
        except CANNOT_READ:
            score(expected_answer, entry)  # if that fails, too, it is the verifier's error
            return 0.0
