"""One handle on all that a run shows and writes down: progress, metrics, samples, time and memory of phases."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_riskpo.config import LoggingConfig
from megatron_riskpo.observability.memory import PhaseMemory
from megatron_riskpo.observability.metrics import MetricsWriter
from megatron_riskpo.observability.progress import Progress
from megatron_riskpo.observability.samples import drop_samples_after, write_samples
from megatron_riskpo.observability.timing import PhaseTimer
from megatron_riskpo.watchdog.watch import Watchdog


class Observer:
    """Every rank has one and measures its phases; only rank 0's writes and speaks."""

    def __init__(
        self, run_dir: Path, config: LoggingConfig, num_steps: int, start_step: int, watchdog: Watchdog, is_writer: bool
    ) -> None:
        self._config = config
        self._watchdog = watchdog
        self._run_dir = run_dir
        self._progress = Progress(num_steps, enabled=is_writer, start_step=start_step)
        self._timer = PhaseTimer(self.enter)
        self._memory = PhaseMemory()
        if is_writer:
            drop_samples_after(run_dir, start_step)
        self._metrics = MetricsWriter(run_dir, config.tensorboard, start_step) if is_writer else None

    def __enter__(self) -> "Observer":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        if self._metrics is not None:
            self._metrics.close()

    def enter(self, phase: str) -> None:
        """Say that this rank begins a phase: to the user, and to the watchdog."""
        self._progress.phase(phase)
        self._watchdog.enter(phase)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body as time/<name>_s and memory/<name>_peak_gib of the step."""
        with self._timer(name), self._memory(name):
            yield

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """The step is done: write its metrics and what its phases took, show its line."""
        row = {**metrics, **self._take_phases()}
        if self._metrics is not None:
            self._metrics.write(step, row)
        self._progress.step(step, row)
        self._watchdog.step_done(step)

    def record_phases(self, step: int) -> None:
        """Add the phases that followed `record` to the same step's line."""
        if self._metrics is not None:
            self._metrics.write(step, self._take_phases())

    def log(self, message: str) -> None:
        """A line for the user."""
        self._progress.log(message)

    def seconds(self, phase: str) -> float:
        """Seconds of a phase in this step so far."""
        return self._timer.seconds(phase)

    def _take_phases(self) -> dict[str, float]:
        return self._timer.take() | self._memory.take()

    def save_samples(self, step: int, rows: Callable[[int], list[dict[str, Any]]]) -> None:
        """On the steps that save samples write rows(number of questions), one row a response."""
        every = self._config.samples_every
        if self._metrics is not None and every > 0 and (step == 1 or step % every == 0):
            write_samples(self._run_dir, step, rows(self._config.samples))
