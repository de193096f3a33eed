"""Graders that compare texts: equality, a pattern, JSON."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_riskpo.rewards.answers import final_answer
from megatron_riskpo.rewards.program_text import last_fenced_block
from megatron_riskpo.rewards.reference import AnswerForm

LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s{0,8}\{([^{}]*)\}")


@dataclass(frozen=True)
class ExactGrader:
    """1.0 if the final answer is the expected text, white space and LaTeX's \\text{} apart, else 0.0. A response that
    states no answer in a form of answers.py is taken whole."""

    form: AnswerForm = "any"

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        return float(plain(expected_answer) in candidates(response, self.form))


@dataclass(frozen=True)
class RegexGrader:
    """1.0 if the field `pattern` (Python's re) matches the whole final answer, else 0.0."""

    form: AnswerForm = "any"

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        pattern = re.compile(fields["pattern"])
        return float(any(pattern.fullmatch(candidate) for candidate in candidates(response, self.form)))


@dataclass(frozen=True)
class JsonGrader:
    """1.0 if the answer is JSON of the same value as the expected answer, else 0.0: 1 equals 1.0 and not true, the
    order of keys is free. The answer is the last fenced block, else the final answer, else the whole response."""

    form: AnswerForm = "any"

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        expected = json.loads(expected_answer)
        block = last_fenced_block(response) if self.form == "any" else None
        texts = [block] if block is not None else raw_candidates(response, self.form)
        return float(any(_is_json_of(text, expected) for text in texts))


def raw_candidates(response: str, form: AnswerForm) -> list[str]:
    """What may be meant as the answer: the stated one and, where the form is free, the whole response."""
    stated = final_answer(response, form)
    found = [stated] if stated is not None else []
    return [*found, response.strip()] if form == "any" and "\\boxed" not in response else found


def candidates(response: str, form: AnswerForm) -> list[str]:
    """raw_candidates in plain()."""
    return [plain(text) for text in raw_candidates(response, form)]


def plain(text: str) -> str:
    """Without LaTeX's \\text{...} around words and with single spaces."""
    return " ".join(LATEX_TEXT.sub(r"\1", text).strip().strip("$").split())


def _is_json_of(text: str, expected: Any) -> bool:
    try:
        return same_json(json.loads(text), expected)
    except (ValueError, RecursionError):
        return False


def same_json(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Equal as JSON values; numbers that are not both integers within the relative tolerance."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return a == b or _is_close(a, b, tolerance)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_json(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key], tolerance) for key in a)
    return type(a) is type(b) and a == b


def _is_close(a: float, b: float, tolerance: float) -> bool:
    """Within the relative tolerance, or the absolute one below 1; infinity and an integer beyond any float are close to
    nothing."""
    try:
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:
        return False
