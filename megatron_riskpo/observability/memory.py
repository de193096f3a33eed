"""The most memory a step needs in each of its phases."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

GIB = 2**30
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK_RESIDENT_SET = "5"
"""What clear_refs takes for it: man 5 proc."""


class PeakMeter(Protocol):
    """A high-water mark of memory."""

    def reset(self) -> None:
        """The mark falls to what is used now."""
        ...

    def read(self) -> float | None:
        """The mark, in bytes; None where there is none."""
        ...


class CudaPeak:
    """What torch's allocator handed out on the current device. Memory that others hold there does not count."""

    def reset(self) -> None:
        # is_initialized: a process that never touched the GPU must not start a context on it.
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> float | None:
        return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_initialized() else None


class ResidentPeak:
    """The process's resident set, without its children. No mark where the system does not let a process reset it."""

    def __init__(self) -> None:
        self._is_reset = False

    def reset(self) -> None:
        try:
            CLEAR_REFS.write_text(RESET_PEAK_RESIDENT_SET)
        except OSError:
            self._is_reset = False
        else:
            self._is_reset = True

    def read(self) -> float | None:
        if not self._is_reset:
            return None
        values = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return 1024.0 * int(values["VmHWM"].split()[0])


class PhaseMemory:
    """`with memory("rollout"): ...` keeps the highest mark of each phase; `take` hands out a step's and starts anew.

    Phases follow one another: the mark of a phase with another inside starts where that one starts.
    """

    def __init__(self, meter: PeakMeter | None = None) -> None:
        self._meter = meter or (CudaPeak() if torch.cuda.is_available() else ResidentPeak())
        self._bytes: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure the body, also when it raises."""
        self._meter.reset()
        try:
            yield
        finally:
            peak = self._meter.read()
            if peak is not None:
                self._bytes[phase] = max(peak, self._bytes.get(phase, 0.0))

    def take(self) -> dict[str, float]:
        """{"memory/<phase>_peak_gib": GiB} since the last call."""
        taken = {f"memory/{phase}_peak_gib": peak / GIB for phase, peak in self._bytes.items()}
        self._bytes = {}
        return taken
