"""The launcher with real child processes. Only the first test imports torch in its ranks; it costs seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_riskpo.distributed.launch import RankEnv, first_host, launch, process_env
from megatron_riskpo.errors import UsageError

ROOT = Path(__file__).parents[2]

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from megatron_riskpo.distributed.launch import die_with_launcher, init_process_group, process_env, report_error
from megatron_riskpo.distributed.signals import StopSignal, agree
die_with_launcher()
folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])
"""


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch) -> Callable[[str], list[str]]:
    """The command of a rank that runs the given lines."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def command(body: str) -> list[str]:
        script = tmp_path / "rank.py"
        script.write_text(PREAMBLE + body)
        return [sys.executable, str(script), str(tmp_path)]

    return command


def start_launcher(command: list[str], num_ranks: int) -> subprocess.Popen:
    """A launcher in a process of its own, to be sent signals."""
    program = (
        f"from megatron_riskpo.distributed.launch import launch\nraise SystemExit(launch({command!r}, {num_ranks}))"
    )
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_ranks_meet_and_stop_at_the_same_step_on_a_signal(ranks, tmp_path: Path) -> None:
    """The launcher is sent SIGUSR1, which one rank hears and the other does not."""
    command = ranks("""
stop = StopSignal.install()
if rank == 0:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
env = process_env()
init_process_group(env, timeout_s=60)
import torch, torch.distributed as dist
total = torch.tensor([float(env.rank + 1)])
dist.all_reduce(total)
(folder / f"ready_{rank}").write_text(str(total.item()))
step = 0
while not agree(stop):
    step += 1
    time.sleep(0.01 * (1 + 4 * rank))
(folder / f"stopped_{rank}").write_text(f"{step}")
dist.destroy_process_group()
""")
    launcher = start_launcher(command, 2)
    try:
        wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)) or launcher.poll() is not None)
        assert {(tmp_path / f"ready_{rank}").read_text() for rank in (0, 1)} == {"3.0"}
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(timeout=60) == 0
    finally:
        launcher.kill()
        assert launcher.stderr is not None
        err = launcher.stderr.read()
    assert "error" not in err
    assert len({(tmp_path / f"stopped_{rank}").read_text() for rank in (0, 1)}) == 1


def test_one_failing_rank_ends_the_others_within_the_grace(ranks, capfd) -> None:
    command = ranks("""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 1:
    report_error("the disk is gone", 3, expected=True)
    raise SystemExit(3)
time.sleep(100)
""")
    started = time.monotonic()
    assert launch(command, 2, grace_s=0.3) == 3
    assert time.monotonic() - started < 20
    assert capfd.readouterr().err == "error: rank 1: the disk is gone\n"


def test_a_rank_that_reports_but_hangs_while_ending_counts_as_failed(ranks, capfd) -> None:
    command = ranks("""
if rank == 0:
    report_error("no such key", 2, expected=True)
time.sleep(100)
""")
    assert launch(command, 2, grace_s=0.3) == 2
    assert capfd.readouterr().err == "error: no such key\n"


def test_the_same_error_of_all_ranks_is_printed_once_and_consequences_not_at_all(ranks, capfd) -> None:
    command = ranks("""
if rank == 2:
    report_error("RuntimeError: connection reset by peer", 1, expected=False)
    raise SystemExit(1)
time.sleep(0.2)
report_error("no such key", 2, expected=True)
raise SystemExit(2)
""")
    launch(command, 3)
    assert capfd.readouterr().err == "error: no such key\n"


def test_an_unexpected_error_of_all_ranks_is_printed_once(ranks, capfd) -> None:
    command = ranks("""
time.sleep(0.2 * (1 - rank))
report_error("ImportError: no module x", 1, expected=False)
raise SystemExit(1)
""")
    assert launch(command, 2) == 1
    assert capfd.readouterr().err == "error: ImportError: no module x\n"


def test_a_killed_rank_is_named(ranks, capfd) -> None:
    command = ranks("""
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
""")
    assert launch(command, 2, grace_s=0.3) == 137
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err


def test_a_rank_that_ends_without_a_word_is_named(ranks, capfd) -> None:
    assert launch(ranks("raise SystemExit(7 if rank == 1 else 0)"), 2, grace_s=0.3) == 7
    assert "rank 1 ended with exit code 7 and no message" in capfd.readouterr().err


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_ranks_die_with_a_killed_launcher(ranks, tmp_path: Path) -> None:
    launcher = start_launcher(
        ranks(
            "(folder / f'draft_{rank}').write_text(str(os.getpid()))\n"
            "(folder / f'draft_{rank}').rename(folder / f'pid_{rank}')\ntime.sleep(100)"
        ),
        2,
    )
    files = [tmp_path / f"pid_{rank}" for rank in (0, 1)]
    wait_for(lambda: all(file.exists() for file in files))
    pids = [int(file.read_text()) for file in files]
    assert all(_alive(pid) for pid in pids)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(_alive(pid) for pid in pids), timeout_s=10)


def test_a_second_interrupt_kills_ranks_that_hang(ranks, tmp_path: Path) -> None:
    launcher = start_launcher(
        ranks(
            "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, signal.SIG_IGN)\n"
            "(folder / f'ready_{rank}').touch()\ntime.sleep(100)"
        ),
        2,
    )
    wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=10) == 130


def test_a_signal_before_the_handlers_stand_is_no_silent_success(ranks, tmp_path: Path) -> None:
    launcher = start_launcher(ranks("(folder / f'ready_{rank}').touch()\ntime.sleep(100)"), 2)
    wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
    launcher.terminate()
    _, err = launcher.communicate(timeout=10)
    assert launcher.returncode == 143
    assert err == "error: stopped by SIGTERM before the run had begun; nothing was written\n"


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu07,gpu[09-10]",
}


def test_rank_from_torchrun_and_srun() -> None:
    assert process_env({}) is None
    assert process_env(dict(TORCHRUN)) == RankEnv(1, 4, 1)
    environ = dict(SRUN)
    assert process_env(environ) == RankEnv(5, 8, 1)
    assert environ["MASTER_ADDR"] == "gpu07"
    other = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    process_env(other)
    assert (environ["WORLD_SIZE"], environ["MASTER_PORT"]) == (other["WORLD_SIZE"], other["MASTER_PORT"])
    assert 10000 <= int(environ["MASTER_PORT"]) < 30000


def test_batch_scripts_and_interactive_shells_of_slurm_are_no_ranks() -> None:
    batch = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert process_env(batch) is None
    assert process_env(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"MASTER_PORT": None}, "MASTER_PORT not"), ({"RANK": "x"}, "integers"), ({"RANK": "4"}, "not within WORLD_SIZE")],
)
def test_a_half_set_environment_is_refused(change, message: str) -> None:
    environ = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        process_env(environ)


def test_first_host_is_what_scontrol_says(tmp_path: Path, monkeypatch) -> None:
    assert first_host("n0") == "n0"
    assert first_host("n0,n[1-3]") == "n0"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[03-04]" ] && printf "n03\\nn04\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert first_host("n[03-04]") == "n03"
