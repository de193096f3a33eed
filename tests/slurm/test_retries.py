"""How often a job goes back into the queue (slurm/job.sh), without a Slurm: each attempt is the end of a batch script
in which a given thing has happened. With a controller: test_scripts, test_jobs."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCONTROL = """#!/bin/bash
[ "$1" = requeue ] || echo "JobId=7 JobState=$STATE Reason=None PreemptTime=$PREEMPTED"
"""
HAPPENS = {
    "idle": "WARNED=yes",
    "saved": 'WARNED=yes; touch "$RISKPO_PROGRESS_FILE"',
    "preempted": "WARNED=yes",
    "stalled": 'echo "rank 1 lags" >"$RISKPO_STALLED_FILE"; echo "rank 1 on n1: exit code 137" >"$RISKPO_FAILED_FILE"',
    "failed": 'echo "rank 0 on n0: exit code 3" >"$RISKPO_FAILED_FILE"',
    "refused": 'echo "rank 0 on n0: exit code 2" >"$RISKPO_FAILED_FILE"',
    "done": 'touch "$RISKPO_DONE_FILE"; WARNED=yes',
}
HAPPENS["cancelled"] = HAPPENS["failed"]
HAPPENS["stalled later"] = f'{HAPPENS["stalled"]}; touch "$RISKPO_PROGRESS_FILE"'
SAVES = 3 * ["idle"] + ["saved"] + 3 * ["idle"]
STALLS = 3 * ["stalled"] + ["stalled later"] + 2 * ["stalled"]
CASES = {
    "time is never enough": (4 * ["idle"], "failed", 1),
    "time was enough once": ([*SAVES, "idle"], "failed", 1),
    "goes on": (12 * ["saved"], "requeued", 0),
    "has to make way": (6 * ["preempted"], "requeued", 0),
    "stalls": (4 * ["stalled"], "failed", 137),
    "stalls in between": ([*STALLS, "stalled"], "failed", 137),
    "fails": (["failed", "failed"], "failed", 3),
    "this and that": (["idle", "stalled", "failed", "idle", "stalled", "failed"], "failed", 3),
    "wrong input": (["refused"], "failed", 2),
    "done": (["idle", "done"], "done", 0),
    "ranks end before TERM is here": (["failed", "cancelled"], "cancelled", 143),
}
"""What happens in the attempts; phase and exit code of the last. All before it are requeued."""


@pytest.mark.parametrize("name", CASES)
def test_a_job_is_requeued_as_often_as_it_may_be_without_progress(name: str, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "env.sh").write_text(f'. "{ROOT}/slurm/env.sh"\nRETRIES=1\n')
    happened, phase, code = CASES[name]
    ends = [attempt(tmp_path, number, what) for number, what in enumerate(happened)]
    assert ends == [("requeued", 0)] * (len(happened) - 1) + [(phase, code)]
    said = (tmp_path / "7" / f"attempt_{len(happened)}" / "batch.log").read_text()
    assert ("ask for more time (--time)" in said) == (happened[-1] == "idle")


def attempt(folder: Path, restarts: int, what: str) -> tuple[str, int]:
    """Phase and exit code at its end."""
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "RISKPO_SLURM": str(ROOT / "slurm"), "SLURM_JOB_ID": "7",
        "RISKPO_ENV": str(folder / "env.sh"), "RISKPO_LOGS": str(folder), "SLURM_RESTART_COUNT": str(restarts),
        "STATE": "COMPLETING" if what == "cancelled" else "RUNNING",
        "PREEMPTED": "2026-01-01T00:00:00" if what == "preempted" else "None",
    }  # fmt: skip
    script = f'. "$RISKPO_SLURM/job.sh"; {HAPPENS[what]}; finish 143'
    ended = subprocess.run(["bash", "-c", script], env=environment, timeout=60)
    phase = (folder / "7" / "state.json").read_text().partition('"phase": "')[2].partition('"')[0]
    return phase, ended.returncode
