"""Grade a response to a question with a mathematical answer.

May hang on hostile answers (9^{9^{9}}) and has no time-out of its own: run it in a GraderPool.
"""

import logging

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_riskpo.rewards.answers import final_answer, quick_grade

# math-verify warns once that its own time-outs are off; they use signals, the pool has a harder limit.
logging.getLogger("math_verify").setLevel(logging.ERROR)
TARGETS = (LatexExtractionConfig(), ExprExtractionConfig())


def grade_math(response_text: str, expected_answer: str) -> float:
    """1.0 if the response's final answer (rule: answers.py) equals the expected one, else 0.0; no answer is 0.0.

    Equal texts and integers are compared at once, everything else by math-verify: 1/2 = \\frac12 = .5, 70 = 70.0,
    50\\% = 50. An error of math-verify goes to the caller: it is no wrong answer.
    """
    quick = quick_grade(response_text, expected_answer)
    if quick is not None:
        return quick
    return math_verdict(final_answer(response_text) or "", expected_answer)


def math_verdict(answer: str, expected_answer: str) -> float:
    """math-verify's own verdict on two answers."""
    return float(verify(_parsed(expected_answer), _parsed(answer), timeout_seconds=None, raise_on_error=True))


def _parsed(answer: str) -> list:
    return parse(f"\\boxed{{{answer}}}", TARGETS, parsing_timeout=None, raise_on_error=True)
