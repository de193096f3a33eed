"""What the batch job of this process is told (slurm/job.sh)."""

import os
from pathlib import Path

_DONE_FILE = "RISKPO_DONE_FILE"


def report_done() -> None:
    """Say that the work is done, and not only stopped by a signal, which has the same exit code: make the file that
    RISKPO_DONE_FILE names, if it is set. Called once, at the very end, by one rank."""
    file = os.environ.get(_DONE_FILE)
    if file:
        Path(file).touch()
