"""slurm/serve.sbatch, run by bash with an srun that only starts its command. Not tested here: a Slurm controller."""

import os
import signal
import subprocess
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "slurm" / "serve.sbatch"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1" >> arguments; shift; done
exec "$@"
"""
# Ends with 0 on TERM, as riskpo serve does.
RISKPO = """#!/bin/bash
printf '%s\\n' "$@" >> arguments
trap 'exit 0' TERM
[[ $* == *bad* ]] && exit 2
while :; do sleep 0.05; done
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    for name, text in (("srun", SRUN), ("riskpo", RISKPO)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(folder),
        "RISKPO_HOST": "node7",
    }  # fmt: skip
    return subprocess.Popen(["bash", SCRIPT, *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE)


def test_the_server_gets_its_arguments_and_ends_with_the_job(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "env.sh").write_text("CONTAINER_ARGS='--container-image=image.sqsh'\n")
    process = start(tmp_path, "my.toml", "--rollout.tp", "4")
    deadline = time.monotonic() + 20
    while not (tmp_path / "arguments").exists() or "4" not in (tmp_path / "arguments").read_text().split():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    endpoint = str(tmp_path / "servers" / "17.json")
    assert (tmp_path / "arguments").read_text().splitlines() == [
        "srun --container-image=image.sqsh", "srun --ntasks=1", "srun --kill-on-bad-exit=1",
        "serve", "--host", "node7", "--endpoint", endpoint, "my.toml", "--rollout.tp", "4",
    ]  # fmt: skip


def test_a_failing_server_fails_the_job(tmp_path):
    assert start(tmp_path, "bad.toml").wait(20) == 2


def test_without_arguments_it_says_what_it_needs(tmp_path):
    process = start(tmp_path)
    assert b"usage: sbatch slurm/serve.sbatch CONFIG_OR_MODEL" in process.communicate(timeout=20)[1]
    assert process.returncode == 2
    assert not (tmp_path / "arguments").exists()
