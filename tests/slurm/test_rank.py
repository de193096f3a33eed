"""What a task runs around its command (slurm/job.sh), without a Slurm: where processes are tracked by cgroups, signals
reach the task's own process alone."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """
import signal, sys, time
got = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
print("ready", flush=True)
while not got:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(40 + int(got[0] == int(sys.argv[1])))
"""


def wrapped(tmp_path: Path, *command: str) -> subprocess.Popen:
    (script,) = re.findall(r"^RANK='(.*?)'$", (ROOT / "slurm" / "job.sh").read_text(), re.MULTILINE | re.DOTALL)
    environment = {"PATH": "/usr/bin:/bin", "RISKPO_FAILED_FILE": str(tmp_path / "failed")}
    environment |= {"SLURM_PROCID": "3", "SLURMD_NODENAME": "n1"}
    return subprocess.Popen(
        ["bash", "-c", script, "rank", *command], env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_task_reaches_the_command(tmp_path, number):
    process = wrapped(tmp_path, sys.executable, "-c", STUB, str(int(number)))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(30) == 41
    assert (tmp_path / "failed").read_text() == "rank 3 on n1: exit code 41\n"


def test_a_command_that_is_killed_or_succeeds(tmp_path):
    killed = wrapped(tmp_path, "bash", "-c", "kill -KILL $$")
    assert killed.wait(30) == 137
    assert (tmp_path / "failed").read_text() == "rank 3 on n1: exit code 137\n"
    (tmp_path / "failed").unlink()
    start = time.monotonic()
    assert wrapped(tmp_path, "true").wait(30) == 0
    assert time.monotonic() - start < 20
    assert not (tmp_path / "failed").exists()
