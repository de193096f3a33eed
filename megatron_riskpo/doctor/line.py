"""A line of `riskpo doctor`: what was looked at, how it is, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Line:
    """One finding."""

    name: str
    state: State
    found: str
    """The numbers."""
    remedy: str = ""
    """Of a warn or fail: what to do."""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.state:<4}  {self.name}: {self.found}{remedy}"


def exit_code(lines: Sequence[Line]) -> int:
    """1 where a line failed: training cannot work."""
    return int(any(line.state == "fail" for line in lines))
