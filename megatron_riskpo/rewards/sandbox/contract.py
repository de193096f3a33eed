"""What it means to run a program: cases in, outputs out. Judging the outputs is the code grader's, outside."""

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

WALL_PER_CPU_S = 4
"""Wall-clock seconds that a test gets a second of CPU time: other processes want the cores, too."""
GRACE_S = 10.0
"""For a sandbox to answer beside the test's own time; beyond it the sandbox has failed."""
MIN_WALL_S = 0.01
"""What a test gets that begins at the deadline: to servers, no time could mean no limit."""

Status = Literal["ok", "failed", "timeout", "output"]


class SandboxError(Exception):
    """The sandbox failed, not the program in it."""


@dataclass(frozen=True)
class Case:
    """One run of a program: with `stdin`, or, where `function` is set, by a call."""

    stdin: str = ""
    function: str = ""
    """Name of a function, or Class.method, that the program defines."""
    args: list[Any] = field(default_factory=list)
    """JSON values."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """JSON values."""


@dataclass(frozen=True)
class CaseResult:
    """What a run came to."""

    status: Status
    """ok: ended by itself, without an error; failed: raised, exited with a code, was killed; timeout: ran out of time;
    output: wrote too much."""
    output: str = ""
    """Standard output, or what the function returned, as JSON."""


class CodeRunner(Protocol):
    """A place in which programs that nobody trusts are run."""

    def run(self, program: str, cases: Sequence[Case], deadline: float = math.inf) -> Generator[CaseResult, None, None]:
        """The results of the cases in order, each made when it is asked for; what still runs at the deadline
        (time.monotonic) ends there, as a timeout. Closing the generator ends the sandbox. No case sees another's
        state, no program another program. Raises SandboxError where the sandbox does not work."""
        ...

    def close(self) -> None:
        """End what still runs."""
        ...


def wall_limit_s(cpu_s: float, deadline: float) -> float:
    """Wall-clock seconds of a test that begins now and may use `cpu_s` of CPU time."""
    return max(min(cpu_s * WALL_PER_CPU_S, deadline - time.monotonic()), MIN_WALL_S)
