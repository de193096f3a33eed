"""Where a rank is, in memory that its guard sees too: a page without a file, written by one and read by the other."""

import mmap
import os
import struct
from dataclasses import dataclass

_FORMAT = struct.Struct("=Qq??64s")


@dataclass(frozen=True)
class Position:
    """Where a rank is in its run."""

    phases: int = 0
    """Phases entered so far: the same number on every rank that is as far."""
    steps_done: int = 0
    phase: str = "start"
    is_starting: bool = True
    """No step has been done since the process began: weights are loaded, kernels compiled."""
    timed_out: bool = False
    """The rank waited for others longer than it may, and asks for help."""

    def __str__(self) -> str:
        return f"{self.phase} after step {self.steps_done}"


class SharedPosition:
    """One `Position` in the memory of a file descriptor (os.memfd_create)."""

    def __init__(self, fd: int) -> None:
        os.ftruncate(fd, mmap.PAGESIZE)
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)

    def write(self, position: Position) -> None:
        name = position.phase.encode()[:64]
        _FORMAT.pack_into(
            self._memory, 0, position.phases, position.steps_done, position.is_starting, position.timed_out, name
        )

    def read(self) -> Position:
        """May be half of one position and half of the next; the reader looks again soon."""
        phases, steps_done, is_starting, timed_out, name = _FORMAT.unpack_from(self._memory, 0)
        return Position(phases, steps_done, name.rstrip(b"\0").decode(errors="replace"), is_starting, timed_out)

    def close(self) -> None:
        self._memory.close()
