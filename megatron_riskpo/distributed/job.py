"""What the batch job of this process is told (slurm/job.sh)."""

import contextlib
import os
from pathlib import Path

_DONE_FILE = "RISKPO_DONE_FILE"
_PROGRESS_FILE = "RISKPO_PROGRESS_FILE"


def report_done() -> None:
    """Say that the work is done, and not only stopped by a signal, which has the same exit code: make the file that
    RISKPO_DONE_FILE names, if it is set. Called once, at the very end, by one rank."""
    file = os.environ.get(_DONE_FILE)
    if file:
        Path(file).touch()


def report_progress() -> None:
    """Say that something was saved from which the same command will go on: make the file that RISKPO_PROGRESS_FILE
    names, if it is set. Called by one rank."""
    file = os.environ.get(_PROGRESS_FILE)
    if file:
        # What was saved is saved, whatever the job knows of it.
        with contextlib.suppress(OSError):
            Path(file).touch()
