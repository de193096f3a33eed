"""Seconds a step spends in each of its phases."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """`with timer("rollout"): ...` adds up wall-clock seconds a phase; `take` hands out a step's and starts anew.

    On CUDA both ends of a phase wait for the device, so that queued kernels count where they were launched. Phases
    follow one another: a phase inside another counts in both.
    """

    def __init__(self, on_phase: Callable[[str], None] | None = None, clock: Callable[[], float] = time.perf_counter):
        self._on_phase = on_phase
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body, also when it raises; `on_phase` hears of it first."""
        if self._on_phase is not None:
            self._on_phase(phase)
        start = self._now()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - start

    def seconds(self, phase: str) -> float:
        """Seconds of a phase in this step so far."""
        return self._seconds.get(phase, 0.0)

    def take(self) -> dict[str, float]:
        """{"time/<phase>_s": seconds} since the last call."""
        taken = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return taken

    def _now(self) -> float:
        # is_initialized: a process that never touched the GPU must not start a context on it.
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return self._clock()
