"""Answers that try to hang, exhaust, crash or fool the mathematics grader, in a real pool: each ends within its limits,
none is right, and answers between them are graded as ever."""

import time

import pytest

from megatron_riskpo.rewards.options import GraderOptions
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.reference import Reference

DEEP = 20_000
TIMEOUT_S, CPU_S = 1.0, 2.0
EXPECTED = "\\frac{22}{7}"


def boxed(content: str) -> str:
    return f"\\boxed{{{content}}}"


def nested(opening: str, inside: str, closing: str, depth: int) -> str:
    return boxed(opening * depth + inside + closing * depth)


HOSTILE = {
    "tower of powers": boxed("9^{9^{9^{9^{9}}}}"),
    "ten to the ten to the ten": boxed("10^{10^{10}}"),
    "python's tower": boxed("9**9**9**9"),
    "factorial of a factorial": boxed("((9!)!)!"),
    "factorial of a million": boxed("1000000!"),
    "large binomial": boxed("\\binom{10^{9}}{5 \\cdot 10^{8}}"),
    "million digits": boxed("7" * 1_000_000),
    "million digits unboxed": "7" * 1_000_000,
    "million digits after a point": boxed("3." + "1" * 1_000_000),
    "a thousand digits to the power": boxed("1" * 900 + "^{99999}"),
    "long sum": boxed("+".join(["1"] * 100_000)),
    "sum just short enough": boxed("+".join(["x"] * 490)),
    "long product of brackets": boxed("(x+1)" * 190),
    "power of a sum": boxed("(a+b+c+d+e+f)^{500}"),
    "nested powers of a sum": boxed("((((x+1)^{99})^{99})^{99})^{99}"),
    "deep fractions": nested("\\frac{1}{", "1", "}", DEEP),
    "fractions just short enough": nested("\\frac{1}{1+", "1", "}", 70),
    "deep parentheses": nested("(", "1", ")", DEEP),
    "parentheses just short enough": nested("(", "1", ")", 490),
    "deep braces": nested("{", "1", "}", DEEP),
    "deep roots": nested("\\sqrt{", "2", "}", DEEP),
    "roots just short enough": nested("\\sqrt{", "2", "}", 140),
    "deep brackets": nested("\\left[", "1", "\\right]", DEEP),
    "deep sets": nested("\\{", "1", "\\}", 240),
    "boxes in boxes": "\\boxed{" * DEEP + "1" + "}" * DEEP,
    "boxes that never close": "\\boxed{" * DEEP,
    "boxes one after another": boxed("1") * DEEP,
    "closing braces": "}" * 100_000 + boxed("1"),
    "unbalanced braces": boxed("{{{1}") + "}}}",
    "brace opened in a box": "\\boxed{\\frac{22}{7}",
    "backslashes": boxed("\\" * 999),
    "escaped brace": "\\boxed{22/7\\}",
    "null bytes": boxed("\x00" * 500),
    "null byte in a number": boxed("22\x00/7"),
    "control characters": boxed("".join(map(chr, range(1, 32)))),
    "lone surrogates": boxed("\ud800\udfff\ud800"),
    "right to left": boxed("\u202e7/22\u202c"),
    "combining characters": boxed("1" + "\u0301" * 990),
    "other digits": boxed("\u0662\u0662/\u0667\u0667"),
    "emoji": boxed("🙂" * 900),
    "dunder": boxed("__import__('os').system('touch /tmp/owned')"),
    "python's exec": boxed("exec('raise SystemExit')"),
    "sympy's name of the class": boxed("S(22)/7 if 1 else Symbol('x').__class__"),
    "attribute walk": boxed("().__class__.__base__.__subclasses__()"),
    "equals everything": boxed("\\text{any answer}=\\frac{21}{7}"),
    "not a number": boxed("\\frac{0}{0}"),
    "infinity over infinity": boxed("\\frac{\\infty}{\\infty}"),
    "endless integral": boxed("\\int_0^{\\infty} \\frac{e^{x^x}}{\\sin(x^{x})}\\,dx"),
    "endless sum": boxed("\\sum_{n=1}^{10^{12}} \\frac{1}{n^n}"),
    "endless product": boxed("\\prod_{n=1}^{10^{9}} n"),
    "limit": boxed("\\lim_{x\\to\\infty}\\frac{\\Gamma(x)^{x}}{x^{x^x}}"),
    "large matrix": boxed("\\begin{pmatrix}" + "1&" * 400 + "1\\end{pmatrix}"),
    "power of a matrix": boxed("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{999999}"),
    "many commas": boxed("1," * 490),
    "many signs": boxed("\\pm" * 300 + "1"),
    "many equals": boxed("x=" * 490 + "1"),
    "catastrophic blanks": boxed("1" + " " * 990 + "x"),
    "fifty thousand lines": "\n" * 50_000 + "answer is " * 10_000,
}


@pytest.fixture(scope="module")
def grades():
    names = list(HOSTILE)
    responses = [text for name in names for text in (HOSTILE[name], boxed("22/7"))]
    options = GraderOptions(timeout_s=TIMEOUT_S, cpu_s=CPU_S)
    with GraderPool(["math"], 2, options) as pool:
        start = time.monotonic()
        found = pool.score(responses, [Reference(EXPECTED)] * len(responses))
        seconds = time.monotonic() - start
        alive = pool.score([boxed("22/7"), boxed("21/7")], [Reference(EXPECTED)] * 2)
    return dict(zip(names, found[::2], strict=True)), found[1::2], alive, seconds


def test_there_are_fifty():
    assert len(HOSTILE) >= 50


@pytest.mark.parametrize("name", HOSTILE)
def test_none_is_right(grades, name: str):
    grade = grades[0][name]
    assert grade.error is not None or grade.score == 0.0


def test_answers_between_them_are_graded_and_the_pool_lives(grades):
    _, between, alive, _ = grades
    # A loaded machine may cost one of them its time; none may be wrong.
    assert all(grade.score == 1.0 or grade.error is not None for grade in between)
    assert sum(grade.score == 1.0 for grade in between) > 0.9 * len(between)
    assert [grade.score for grade in alive] == [1.0, 0.0]


def test_all_of_them_end_in_their_time(grades):
    # Two workers; a second for a new worker after each that was killed.
    assert grades[3] < len(HOSTILE) * (TIMEOUT_S + 3.0) / 2 + 60
