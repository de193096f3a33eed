"""Numbers within a tolerance, as geometry asks for: 12.99 where 7.5\\sqrt{3} is expected."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_riskpo.rewards.answers import MAX_ANSWER_LENGTH, final_answer
from megatron_riskpo.rewards.graders.mathematics import parsed_answer
from megatron_riskpo.rewards.reference import AnswerForm

DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class NumericGrader:
    """1.0 if the final answer is within a relative tolerance of the expected number, else 0.0.

    The question's field `tolerance` wins over the run's. 0 is met exactly, or within the field `absolute_tolerance`.
    Units behind the number, degree signs and $ are left out; roots, fractions and pi are computed.
    """

    form: AnswerForm = "any"
    tolerance: float = 0.01

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        expected = number_of(expected_answer)
        if expected is None:
            raise ValueError(f"the expected answer {expected_answer!r:.60} is no number")
        answer = number_of(final_answer(response, self.form) or "")
        if answer is None:
            return 0.0
        allowed = max(
            float(fields.get("tolerance", self.tolerance)) * abs(expected), float(fields.get("absolute_tolerance", 0.0))
        )
        return float(abs(answer - expected) <= allowed)


def number_of(text: str) -> float | None:
    """The real number that the text stands for; None where it is none, or not finite."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    if DECIMAL.fullmatch(text.strip()):
        value = float(text.replace(",", ""))
    else:
        value = next((number for number in map(_as_float, parsed_answer(text)) if number is not None), None)
    return value if value is not None and math.isfinite(value) else None


def _as_float(parsed: Any) -> float | None:
    """Of a sympy expression, or of an equation's right side."""
    value = getattr(parsed, "rhs", parsed)
    try:
        return float(value.evalf()) if hasattr(value, "evalf") else None
    except (TypeError, ValueError, OverflowError):
        return None
