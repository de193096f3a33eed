"""stall/ of a run folder: what guards write when a run stands still."""

import contextlib
import os
import socket
import time
from pathlib import Path

FOLDER = "stall"


class StallFolder:
    """Of one attempt: files of an earlier one are not read. `start`: Unix time at which this rank began."""

    def __init__(self, run_dir: Path, start: float) -> None:
        self.path = run_dir / FOLDER
        self._start = start
        self._old: tuple[str, str] | None = None

    def look_back(self) -> None:
        """Note what an earlier attempt has left; before, nothing counts as said in this one."""
        self._old = self._read("call.txt"), self._read("report.txt")

    @property
    def called_for(self) -> str:
        """Why a rank has called the others to write their stacks; empty: none has."""
        text = self._read("call.txt")
        return "" if self._old is None or text == self._old[0] else text.partition("\n")[0]

    @property
    def report(self) -> str:
        """What the guard that speaks for all has found; empty before."""
        text = self._read("report.txt")
        return "" if self._old is None or text == self._old[1] else text

    def call_once(self, rank: int, cause: str) -> None:
        """Unless one has."""
        if not self.called_for:
            self._write("call.txt", f"{cause}\nrank {rank} at {time.time():.3f}\n")

    def write_report(self, text: str) -> None:
        self._write("report.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def write_stacks(self, rank: int, place: str, stacks: str) -> None:
        self._write(f"rank_{rank}.txt", f"{time.time():.3f} rank {rank}: {place}\n\n{stacks}")

    def stacks(self, rank: int) -> str:
        """Of this attempt; empty where there are none."""
        first, _, stacks = self._read(f"rank_{rank}.txt").partition("\n")
        with contextlib.suppress(ValueError, IndexError):
            return stacks if float(first.split()[0]) >= self._start else ""
        return ""

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except OSError:
            return ""

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all. A file system that takes nothing must not keep the guard from ending the run."""
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            draft = self.path / f".{name}.{socket.gethostname()}.{os.getpid()}"
            draft.write_text(text)
            draft.replace(self.path / name)
