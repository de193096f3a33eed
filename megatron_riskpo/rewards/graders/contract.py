"""What a grader is."""

from collections.abc import Mapping
from typing import Any, Protocol


class Grader(Protocol):
    """Grades one response. Runs in a worker process; may hang or raise: the pool has the limits."""

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        """The reward, any finite number (right: 1.0, wrong or no answer: 0.0). `fields`: the question's other fields,
        JSON values. Whatever it raises is an error, and no wrong answer."""
        ...
