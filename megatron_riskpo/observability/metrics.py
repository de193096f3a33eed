"""metrics.jsonl (one JSON object a step) and TensorBoard events beside it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import UsageError

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Writes a run's metrics. Rank 0 only; a full disk surfaces as OSError.

    `start_step` is the number of steps done: what an earlier process wrote about later steps is dropped, so that no
    step appears twice. 0 starts from nothing.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, start_step: int = 0):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        kept = [row for row in parse_lines(path) if row["step"] <= start_step] if start_step and path.exists() else []
        replace_lines(path, kept)
        self._last: dict[str, Any] = kept[-1] if kept else {"step": -1}
        self._file = path.open("rb+")
        self._file.seek(0, os.SEEK_END)
        self._last_offset = self._file.tell() - (len(to_line(self._last).encode()) if kept else 0)
        self._events = open_events(run_dir / "tensorboard", start_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the step's line and flush it. The last step again: its line gains the new values (an evaluation that
        follows the step). Values are numbers or one-element tensors; what is not finite becomes null."""
        if step < self._last["step"]:
            raise ValueError(f"metrics of step {step} come after those of step {self._last['step']}")
        repeated = step == self._last["step"]
        row = {**(self._last if repeated else {}), "step": step, **{k: to_number(v) for k, v in metrics.items()}}
        if repeated:
            self._file.seek(self._last_offset)
        self._last, self._last_offset = row, self._file.tell()
        self._file.write(to_line(row).encode())
        self._file.flush()
        # Not before: a run that is killed in between would have lost the line, and its checkpoint may stand already.
        self._file.truncate()
        if self._events is not None:
            for key, value in metrics.items():
                self._events.add_scalar(key, float(value), step)
            self._events.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """A run's metrics, one dict a step, steps ascending; null values are None. A last line that is not whole (the
    run is going on, or was killed) is left out. Raises UsageError where there are none."""
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise UsageError(
            f"{run_dir} has no {FILE_NAME}: name the folder of a run that `riskpo train` wrote (runs/NAME)"
        )
    rows = parse_lines(path)
    if not rows:
        raise UsageError(f"{path} has no whole line yet: wait for the first step of the run")
    return rows


def parse_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file, less a half-written last line."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise UsageError(f"{path} line {number} is no metrics object: {line[:60]!r}; remove the line")
    return rows


def to_number(value: float) -> float | int | None:
    """A JSON number, or None where JSON has none (nan, inf)."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def replace_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rewrite the file in one move: a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(to_line, rows))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def open_events(folder: Path, start_step: int) -> Any:
    """A TensorBoard writer; TensorBoard hides events of earlier processes at or after the purge step."""
    # Here, because it takes a second that `riskpo report` has no use for.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)
