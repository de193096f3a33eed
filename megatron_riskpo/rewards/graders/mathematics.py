"""Grade a response to a question with a mathematical answer.

May hang on hostile answers (9^{9^{9}}) and has no time-out of its own: run it in a GraderPool.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import I

from megatron_riskpo.rewards.answers import final_answer, quick_grade
from megatron_riskpo.rewards.graders.notation import normalized, only_bounds, split_unit, units_differ, without_percent
from megatron_riskpo.rewards.reference import AnswerForm

# math-verify warns once that its own time-outs are off; they use signals, the pool has a harder limit.
logging.getLogger("math_verify").setLevel(logging.ERROR)
TARGETS = (LatexExtractionConfig(), ExprExtractionConfig())


# math-verify rounds to 6 digits by itself, by which 0.333333 would be a third.
ROUNDING_DIGITS = 12
IMAGINARY = "i"


@dataclass(frozen=True)
class MathGrader:
    """1.0 if the response's final answer (rule: answers.py) equals the expected one, else 0.0; no answer is 0.0.

    Equal texts and integers are compared at once, everything else by math-verify, in notation.py's terms: 1/2 =
    \\frac12 = .5, 70 = 70.0, 50\\% = 50. An error of math-verify goes to the caller: it is no wrong answer.
    """

    form: AnswerForm = "any"

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        quick = quick_grade(response, expected_answer, self.form)
        if quick is not None:
            return quick
        return math_verdict(final_answer(response, self.form) or "", expected_answer)


def math_verdict(answer: str, expected_answer: str) -> float:
    """1.0 if the two stand for the same, 0.0 otherwise."""
    return float(any(_same(*pair) for pair in _readings(normalized(answer), normalized(expected_answer))))


def _readings(answer: str, expected: str) -> Iterator[tuple[str, str]]:
    """(answer, expected) as they stand, without units, and without a percent sign that only one of them has."""
    (value, unit), (expected_value, expected_unit) = split_unit(answer), split_unit(expected)
    if not value or units_differ(unit, expected_unit) or only_bounds(answer, expected):
        return
    yield answer, expected
    if (value, expected_value) != (answer, expected):
        yield value, expected_value
    bare, bare_expected = without_percent(answer), without_percent(expected)
    if (bare is None) != (bare_expected is None):
        yield bare if bare is not None else answer, bare_expected if bare_expected is not None else expected


def _same(answer: str, expected: str) -> bool:
    if answer == expected:
        return True
    gold, given = parsed_answer(expected), parsed_answer(answer)
    if _verified(gold, given):
        return True
    has_i = any(symbol.name == IMAGINARY for item in (*gold, *given) for symbol in getattr(item, "free_symbols", ()))
    return has_i and _verified(_with_imaginary(gold), _with_imaginary(given))


def _verified(gold: list, given: list) -> bool:
    return bool(gold and given) and verify(
        gold, given, float_rounding=ROUNDING_DIGITS, allow_set_relation_comp=True, timeout_seconds=None,
        raise_on_error=True,
    )  # fmt: skip


def _with_imaginary(parsed: list) -> list:
    """The letter i as the imaginary unit."""
    units = {s: I for item in parsed for s in getattr(item, "free_symbols", ()) if s.name == IMAGINARY}
    return [item.subs(units) if hasattr(item, "subs") else item for item in parsed]


def parsed_answer(answer: str) -> list:
    """What math-verify reads in the answer: sympy objects and texts; empty if nothing."""
    return parse(f"\\boxed{{{answer}}}", TARGETS, parsing_timeout=None, raise_on_error=True)
