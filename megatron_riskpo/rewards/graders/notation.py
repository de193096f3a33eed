"""LaTeX answers in the notation that math-verify reads right.

Each rule is one that a pair in tests/data/math_pairs.jsonl asks for. Text in, text out; every pattern is linear.
"""

import re
from collections.abc import Callable
from fractions import Fraction

MAX_PERIOD = 50
"""Digits of a repeating decimal."""
INVISIBLE = re.compile(r"\\[hv]?phantom\s?\{[^{}]*\}|\\(?:displaystyle|textstyle|left(?=\\\{)|!)(?![A-Za-z])")
LABEL = re.compile(r"^\s*\\text\s?\{[^{}]*[:=]\s*\}")
DIGIT_GROUP = re.compile(r"(?<=[0-9])(?:\\[,;:! ]|\{,\})(?=[0-9]{3}(?![0-9]))")
SPACE = re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])")
LONE_BACKSLASH = re.compile(r"(?<!\\)\\\s*$")
SET_BUILDER = re.compile(r"\s*\\\{\s*([A-Za-z])\s*(?:\\mid(?![A-Za-z])|\||:)\s*(\1[^{}|]*)\\\}\s*")
E_NOTATION = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})")
EMPTY_SET = re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}|∅")
REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\s?\{([0-9]+)\}")
DEGREES = re.compile(
    r"\\(sin|cos|tan|cot|sec|csc)\s?(?:\\left)?\s?[({]?\s?([0-9]+(?:\.[0-9]+)?)\s?\^\s?\{?\s?\\circ\s?\}?\s?(?:\\right)?\s?[)}]?"
)
VALUE_FIRST = re.compile(r"([^=<>]+)=\s*([A-Za-z])\s*")
PERCENT = re.compile(r"\s*\\?%\s*$")
UNIT = re.compile(r"\s*\\(?:text|textbf|mathrm|mbox|textit|rm)\s?\{([^{}]*)\}(?:\^\s?\{?\s?[0-9]\s?\}?)?\s*$")
QUALIFIER = re.compile(
    r"\b(?:or|and|not|least|most|more|less|fewer|than|about|approximately|between|to)\b", re.IGNORECASE
)
OPERAND_BEFORE = re.compile(r"[0-9A-Za-z)\]}!]\s*$")
BOUND = re.compile(r"\b(?:at least|at most|more|less|fewer|than|about|approximately|or so)\b", re.IGNORECASE)
SAME_UNITS = (
    "mm millimeter millimeters", "cm centimeter centimeters", "m meter meters metre metres", "km kilometer kilometers",
    "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles", "g gram grams", "kg kilogram kilograms",
    "s sec second seconds", "min minute minutes", "h hr hour hours", "day days", "week weeks", "year years",
    "degree degrees", "radian radians", "dollar dollars", "cent cents", "mph", "m/s", "km/h",
)  # fmt: skip
UNITS = {name: number for number, names in enumerate(SAME_UNITS) for name in names.split()}


def normalized(answer: str) -> str:
    """The same answer, without what cannot be seen, and in notation that math-verify knows."""
    for rule in _RULES:
        answer = rule(answer)
    return answer.strip()


def without_percent(answer: str) -> str | None:
    """The answer without its percent sign; None where it has none."""
    found = PERCENT.search(answer)
    return answer[: found.start()] if found else None


def split_unit(answer: str) -> tuple[str, str]:
    """(value, unit): a text behind something that can have a unit. "5 \\text{ or more}" is no value with a unit."""
    found = UNIT.search(answer)
    if not found or QUALIFIER.search(found[1]) or not OPERAND_BEFORE.search(answer[: found.start()]):
        return answer, ""
    return answer[: found.start()].strip(), found[1].strip().lower()


def units_differ(a: str, b: str) -> bool:
    """Whether two units are known, and not the same: cm and m, but not cm and centimeters, nor apples and pieces."""
    known = [UNITS.get(unit) for unit in (a, b)]
    return None not in known and known[0] != known[1]


def only_bounds(answer: str, expected: str) -> bool:
    """Whether words make the answer a bound or a guess ("5 or more"), and not the expected one."""
    return BOUND.search(answer) is not None and BOUND.search(expected) is None


def _e_notation(answer: str) -> str:
    found = E_NOTATION.fullmatch(answer.strip())
    return f"{found[1]} \\times 10^{{{int(found[2])}}}" if found else answer


def _repeating(found: re.Match[str]) -> str:
    whole, head, period = found[1] or "0", found[2], found[3]
    if len(whole) + len(head) + len(period) > MAX_PERIOD:
        return found[0]
    value = Fraction(int(whole + head + period) - int(whole + head), 10 ** len(head) * (10 ** len(period) - 1))
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _value_last(answer: str) -> str:
    found = VALUE_FIRST.fullmatch(answer)
    return f"{found[2]} = {found[1].strip()}" if found and not found[1].strip().isalpha() else answer


_RULES: tuple[Callable[[str], str], ...] = (
    lambda answer: LABEL.sub("", answer),
    lambda answer: DIGIT_GROUP.sub("", answer),
    lambda answer: INVISIBLE.sub("", answer),
    lambda answer: SPACE.sub(" ", answer),
    lambda answer: LONE_BACKSLASH.sub("", answer),
    _e_notation,
    lambda answer: SET_BUILDER.sub(r"\2", answer),
    lambda answer: EMPTY_SET.sub(r"\\emptyset", answer),
    lambda answer: REPEATING.sub(_repeating, answer),
    lambda answer: DEGREES.sub(r"\\\1(\\frac{\2 \\pi}{180})", answer),
    _value_last,
)
