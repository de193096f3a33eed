"""`riskpo train` whose ranks write down what they are doing, so that a kill can be aimed, and told afterwards.

    python -m tests.crash.marked_run MARKS_FOLDER NUM_RANKS train X.toml ...

marks_R_training has the phases that rank R's training loop goes through, one a line, marks_R_writing those of its
checkpoints' writer. The writer dwells a little around what takes next to no time, or no kill would ever hit it.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

DWELL_S = 0.1
WRITER_PHASES = {
    "_write_files": "files",
    "write_manifest": "manifest",
    "publish": "publish",
    "remove_old": "retention",
}
"""What writing.py calls, and how it is called here."""


def marks_file(folder: Path, rank: int, thread: str) -> Path:
    return folder / f"marks_{rank}_{thread}"


def pid_file(folder: Path, rank: int) -> Path:
    return folder / f"pid_{rank}"


def mark(file: Path, phase: str) -> None:
    """One write, so that the line is there or not."""
    with file.open("a") as stream:
        stream.write(f"{phase}\n")


def run_marked(folder: Path, rank: int, arguments: list[str]) -> int:
    from megatron_riskpo import cli
    from megatron_riskpo.distributed import cpu_backend

    cpu_backend.install()
    from megatron_riskpo.checkpoint import writing
    from megatron_riskpo.observability.observer import Observer

    pid_file(folder, rank).write_text(str(os.getpid()))
    training, plain_phase = marks_file(folder, rank, "training"), Observer.phase

    @contextmanager
    def phase(self: Observer, name: str) -> Iterator[None]:
        mark(training, name)
        with plain_phase(self, name):
            yield
        mark(training, "between")

    with mock.patch.object(Observer, "phase", phase):
        for name, of_writer in WRITER_PHASES.items():
            setattr(writing, name, _marked(getattr(writing, name), of_writer, marks_file(folder, rank, "writing")))
        return cli.main(arguments)


def _marked(work: Callable[..., Any], phase: str, file: Path) -> Callable[..., Any]:
    def marked(*arguments: Any) -> Any:
        mark(file, phase)
        time.sleep(random.SystemRandom().uniform(0, DWELL_S))
        result = work(*arguments)
        time.sleep(random.SystemRandom().uniform(0, DWELL_S))
        mark(file, "idle")
        return result

    return marked


def main() -> int:
    folder, num_ranks, *arguments = sys.argv[1:]
    if "RANK" in os.environ:
        return run_marked(Path(folder), int(os.environ["RANK"]), arguments)
    from megatron_riskpo.distributed.launch import launch

    return launch([sys.executable, "-m", "tests.crash.marked_run", *sys.argv[1:]], int(num_ranks))


if __name__ == "__main__":
    raise SystemExit(main())
