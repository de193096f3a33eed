"""A Python function of the user's own as grader."""

import inspect
from collections.abc import Mapping
from typing import Any

from megatron_riskpo.plugins import load_function
from megatron_riskpo.rewards.graders.contract import Grader


def user_grader(name: str) -> Grader:
    """module:function or FILE.py:function, called with (response, expected answer) and, if it has a third parameter,
    the question's other fields. It is the user's code and trusted as such. Raises UsageError if it cannot be loaded."""
    function = load_function("rewards.grader", name)
    takes_fields = _num_positional(function) >= 3

    def grade(response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        arguments = (response, expected_answer, dict(fields)) if takes_fields else (response, expected_answer)
        return float(function(*arguments))

    return grade


def _num_positional(function: Any) -> float:
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return float("inf")
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
