"""Final answers, and verdicts against math-verify and against the semantics that nemo-skills documents."""

import random
import time

import pytest

from megatron_riskpo.rewards.answers import final_answer, quick_grade
from megatron_riskpo.rewards.graders.mathematics import MathGrader, math_verdict


def grade_math(response: str, expected_answer: str) -> float:
    return MathGrader()(response, expected_answer, {})


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\boxed{12}", "12"),
        ("\\boxed{1} no, \\boxed{ $-2$. }", "-2"),
        ("\\boxed{\\frac{1}{2}} since {x}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{12} or \\boxed{1", "12"),
        ("7 8 \\boxed{1", None),
        ("\\boxed{}", None),
        ("The answer is 42.", "42"),
        ("Final answer: $\\frac{1}{2}$\nDone in 3 steps", "\\frac{1}{2}"),
        ("the answer is 3. But no: the Answer is -4, since 5 - 9 = -4", "-4"),
        ("The answer is (1, 2)", "(1, 2)"),
        ("first 4 - 1\n4 - 1 = 3", "3"),
        ("x = 5\nx = \\frac{1}{3}\n", "\\frac{1}{3}"),
        ("-30", "-30"),
        ("it is 5-3", "3"),
        ("it is 1,234, I think", "1,234"),
        ("about 3.5 or 1/2", "1/2"),
        ("", None),
        ("no idea", None),
    ],
)
def test_final_answer_by_the_rule(response: str, answer: str | None):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("\\frac12", "1/2", 1.0),
        (".5", "1/2", 1.0),
        ("70.0", "70", 1.0),
        ("50\\%", "50", 1.0),
        ("1,000", "1000", 1.0),
        ("x = 12", "12", 1.0),
        ("1+x", "x+1", 1.0),
        ("(2,1)", "(1,2)", 0.0),
        ("0.333", "1/3", 0.0),
        ("north", "north", 1.0),
        ("south", "north", 0.0),
        ("1.2 \\times 10^{3}", "1200", 1.0),
    ],
)
def test_verdicts(answer: str, expected: str, score: float):
    assert grade_math(f"\\boxed{{{answer}}}", expected) == score


@pytest.mark.parametrize(
    "answer", ["57 - 87", "57-87", "10 * (-3)", "-60/2", "-15 \\cdot 2", "-(57-27)", "57 \u2212 87"]
)
def test_a_calculation_is_no_answer_to_an_integer_question(answer: str):
    assert grade_math(f"\\boxed{{{answer}}}", "-30") == 0.0


@pytest.mark.parametrize("response", ["", "   \n", "\\boxed{", "\\boxed{}", "\x00"])
def test_no_answer_is_wrong_not_an_error(response: str):
    assert grade_math(response, "1") == 0.0


def test_integers_get_the_verdict_of_math_verify():
    rng = random.Random(0)
    forms = [lambda n: str(n), lambda n: f"{n:+d}", lambda n: f"{'-' if n < 0 else ''}00{abs(n)}"]
    for _ in range(150):
        expected = rng.choice([0, rng.randint(-20, 20), rng.randint(-(10**6), 10**6), rng.randint(0, 10**25)])
        given = expected if rng.random() < 0.5 else expected + rng.choice([-1, 1, 10, -2 * expected])
        answer = rng.choice(forms)(given)
        quick = quick_grade(f"\\boxed{{{answer}}}", str(expected))
        assert quick == math_verdict(answer, str(expected)), (answer, expected)


def test_quick_grade_is_linear_in_hostile_text():
    start = time.perf_counter()
    for part in ("\\boxed{", "{", "}", "\\", "answer is ", "1,", "1/", "=", "+-", " ", "1" * 10):
        quick_grade(part * 20_000, "12")
        quick_grade(f"\\boxed{{{part * 20_000}}}", "12")
    assert time.perf_counter() - start < 3
