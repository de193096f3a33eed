"""What the user sees while a run goes on: one live line on a terminal, one quiet line a step elsewhere."""

import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

# The ETA follows the mean of so many last steps: compilation in the first ones must not weigh on it for long.
ETA_WINDOW = 20


class Progress:
    """Context manager; `enabled` on rank 0 only. `phase` fits PhaseTimer's on_phase."""

    def __init__(self, total_steps: int, enabled: bool, console: Console | None = None, start_step: int = 0):
        self._total = total_steps
        self._enabled = enabled
        self._console = console or Console(highlight=False)
        self._durations: deque[float] = deque(maxlen=ETA_WINDOW)
        self._step = start_step
        self._step_start = time.perf_counter()
        self._bar = make_bar(self._console) if enabled and self._console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, phase="", status="")

    def __enter__(self) -> "Progress":
        self._step_start = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.update(self._task, phase="")
            self._bar.refresh()
            self._bar.stop()

    def phase(self, name: str) -> None:
        """The step's current phase; shown on a terminal only."""
        if self._bar is not None:
            self._bar.update(self._task, phase=name)
            self._bar.refresh()

    def log(self, message: str) -> None:
        """A line above the bar; its text is shown as it is, without rich's markup."""
        if self._enabled:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The step is done (and those since the last call); metrics are those of metrics.jsonl."""
        now = time.perf_counter()
        # Step 0 is the evaluation before training: its time says nothing about a step's.
        if step > self._step:
            self._durations.append((now - self._step_start) / (step - self._step))
        self._step, self._step_start = step, now
        learning, phases, evaluations, eta = describe(metrics, self._eta(step))
        if self._bar is None:
            self.log(f"step {step}/{self._total} {join(learning, phases, evaluations, eta)}")
            return
        if evaluations:
            self.log(f"step {step}/{self._total} {evaluations}")
        self._bar.update(self._task, completed=step, status=join(learning, eta))
        self._bar.refresh()

    def _eta(self, step: int) -> float | None:
        """Seconds to go; None before the first step."""
        if not self._durations:
            return None
        return (self._total - step) * sum(self._durations) / len(self._durations)


def make_bar(console: Console) -> RichProgress:
    # The bar itself only where the numbers leave room for it (80 columns do not).
    bar = [BarColumn(bar_width=16)] if console.width >= 100 else []
    return RichProgress(
        TextColumn("step"),
        MofNCompleteColumn(),
        *bar,
        TextColumn("{task.fields[status]}", markup=False),
        TextColumn("[cyan]{task.fields[phase]}"),
        console=console,
        # No refresh thread: a grader process forked while the thread holds the console's lock would hang.
        auto_refresh=False,
    )


def describe(metrics: Mapping[str, Any], eta_s: float | None) -> tuple[str, str, str, str]:
    """A step in words, each empty where its metrics are missing: `reward 0.410 entropy 0.834 | 1234 tok/s`,
    `rollout 0.31 s update 0.42 s`, `heldout/pass@1 0.250`, `ETA 02:13`."""
    learning = labelled(metrics, {"sft/loss": "loss", "reward/mean": "reward", "actor/entropy": "entropy"})
    speed = metrics.get("rollout/tokens_per_second")
    phases = [
        f"{key.removeprefix('time/').removesuffix('_s')} {value:.2f} s"
        for key, value in metrics.items()
        if key.startswith("time/")
    ]
    evaluations = labelled(metrics, {key: key.removeprefix("eval/") for key in metrics if is_headline(key)})
    eta = f"ETA {str(timedelta(seconds=round(eta_s))).removeprefix('0:')}" if eta_s is not None else ""
    return join(learning, f"{speed:.0f} tok/s" if speed is not None else ""), " ".join(phases), evaluations, eta


def is_headline(key: str) -> bool:
    """An evaluation's figure, less the ends of its interval, which are in metrics.jsonl."""
    return key.startswith("eval/") and not key.endswith(("_low", "_high"))


def join(*parts: str) -> str:
    return " | ".join(part for part in parts if part)


def labelled(metrics: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """`label value` of the metrics that are there."""
    found = ((label, metrics.get(key)) for key, label in labels.items())
    return " ".join(f"{label} {value:.3f}" for label, value in found if value is not None)
