"""Real ranks and their guards, without torch: who is ended, when, and what is left behind.

A whole run with a stopped rank: test_ends_of_runs.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_riskpo.watchdog.guard import POLL_S, SUSPENDED_S, Guard
from megatron_riskpo.watchdog.heartbeat import heartbeat_path, read_heartbeat
from megatron_riskpo.watchdog.record import Position, SharedPosition
from megatron_riskpo.watchdog.settings import GuardSettings
from megatron_riskpo.watchdog.watch import Watchdog, _is_timeout

ROOT = Path(__file__).parents[2]
LIMIT_S = 2.0
PREAMBLE = """
import ctypes, os, signal, sys, time
from types import SimpleNamespace
from megatron_riskpo.cli import explain
from megatron_riskpo.distributed.launch import RankEnv, die_with_launcher, process_env, report_error
from megatron_riskpo.watchdog.settings import GuardSettings
from megatron_riskpo.watchdog.watch import Watchdog
die_with_launcher()
folder, limit_s = sys.argv[1], float(sys.argv[2])
env = process_env() or RankEnv(int(sys.argv[3]), 2, 0)
rank = env.rank
run = SimpleNamespace(dir=folder, name="run", stall_limit_s=limit_s, timeout_s=1.0)

def stand_still():
    with open(f"{folder}/stopped", "w") as file:
        print(os.getpid(), watchdog._guard.pid, file=file)
    os.kill(os.getpid(), signal.SIGSTOP)

def stand_still_with_the_guard():
    while not os.path.exists(f"{folder}/run/heartbeats/rank_{rank}.json"):
        time.sleep(0.05)
    os.kill(watchdog._guard.pid, signal.SIGSTOP)
    stand_still()

def hold_the_lock():
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)

"""


LATE = """
if rank == {late}:
    watchdog.enter("rollout")
    stand_still()
# A rank may start seconds later than the other.
while not os.path.exists(folder + "/stopped"):
    watchdog.enter("rollout")
    time.sleep(0.05)
watchdog.enter("reward")
time.sleep(100)
"""
LAUNCHER = "from megatron_riskpo.distributed.launch import launch\nraise SystemExit(launch({rank!r}, 2))"
BOTH_STOPPED = LATE.replace("stand_still", "stand_still_with_the_guard").format(late=1)
JOBS = {
    "rank 0 stopped": LATE.format(late=0),
    "rank 1 stopped": LATE.format(late=1),
    "lock held": "watchdog.enter('rollout')\nif rank == 1:\n    hold_the_lock()\ntime.sleep(100)",
    "collective timed out": """
watchdog.enter("rollout")
if rank == 1:
    time.sleep(100)
watchdog.enter("reward")
raise RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation")
""",
    "goes on": """
for step in range(1, 9):
    watchdog.enter("update")
    time.sleep(0.7)
    watchdog.step_done(step)
""",
    "node lost": """
watchdog.enter("update")
while rank == 0 and not os.path.exists(f"{folder}/run/heartbeats/rank_0.json"):
    time.sleep(0.05)
if rank == 0:
    watchdog._guard.kill()
    stand_still()
time.sleep(100)
""",
    "rank and guard stopped": BOTH_STOPPED,
    "rank and guard stopped, torchrun": BOTH_STOPPED,
    # A pipe that nobody writes into: whoever opens it to read waits, as on a file system that hangs.
    "folder hangs": """
os.kill(watchdog._guard.pid, signal.SIGKILL)
watchdog._guard.wait()
os.makedirs(f"{folder}/run/stall", exist_ok=True)
if rank == 0:
    os.mkfifo(f"{folder}/run/stall/call.txt")
while not os.path.exists(f"{folder}/run/stall/call.txt"):
    time.sleep(0.05)
with Watchdog(run, env) as watchdog:
    watchdog.enter("checkpoint")
    open(f"{folder}/stopped", "w").close()
    time.sleep(100)
""",
    # A pipe that nobody empties, as a terminal that is stopped or a log on a disk that hangs.
    "output is full": """
os.kill(watchdog._guard.pid, signal.SIGKILL)
watchdog._guard.wait()
unread, full = os.pipe()
os.set_blocking(full, False)
try:
    while os.write(full, bytes(4096)):
        pass
except BlockingIOError:
    os.set_blocking(full, True)
os.dup2(full, 2)
with Watchdog(run, env) as watchdog:
    watchdog.enter("update")
    open(f"{folder}/stopped", "w").close()
    time.sleep(1000)
""",
    "crash": "def crash():\n    os.abort()\nwatchdog.enter('sync')\ncrash()",
}
"""What a rank does, by job. All run side by side: each only waits."""
NODES = {"node lost": (1, 0), "output is full": (0,), "crash": (1, 0)}
"""Jobs without a launcher, as srun starts them: a rank a node, those that are started of two."""
TO_END_S = 45.0
"""From the limit to the end of the job, on any machine; tools/benchmark/stall.py measures it."""


@dataclass(frozen=True)
class Ended:
    """A job that has ended."""

    code: int
    err: str
    at: float
    """Unix time."""
    folder: Path

    @property
    def seconds_after_the_limit(self) -> float:
        """Since a rank stood still for as long as it may; before the first step that is the longer of two limits."""
        return self.at - (self.folder / "stopped").stat().st_mtime - LIMIT_S

    def stacks(self, rank: int) -> str:
        return (self.folder / "run" / "stall" / f"rank_{rank}.txt").read_text()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Ended]:
    running = {name: _start(tmp_path_factory.mktemp("job"), name) for name in JOBS}
    try:
        with ThreadPoolExecutor(len(running)) as pool:
            return dict(zip(running, pool.map(_end, running.values()), strict=True))
    finally:
        for job in running.values():
            for each in job.processes:
                each.kill()
                each.wait()


@dataclass(frozen=True)
class Running:
    """A job; the first of its processes speaks for it."""

    folder: Path
    processes: list[subprocess.Popen]


def _start(folder: Path, name: str) -> Running:
    lines = "\n".join(f"    {line}" for line in JOBS[name].strip().splitlines())
    script = folder / "rank.py"
    script.write_text(f"{PREAMBLE}with Watchdog(run, env) as watchdog:\n{lines}\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(ROOT)
    arguments = [str(script), str(folder), str(LIMIT_S)]
    rank = [sys.executable, *arguments]
    commands = [[sys.executable, "-c", LAUNCHER.format(rank=rank)]]
    if name in NODES:
        commands = [[*rank, str(number)] for number in NODES[name]]
    elif name.endswith("torchrun"):
        commands = [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]]
    return Running(
        folder, [subprocess.Popen(each, env=environment, stderr=subprocess.PIPE, text=True) for each in commands]
    )


def _end(job: Running) -> Ended:
    _, err = job.processes[0].communicate(timeout=90)
    return Ended(job.processes[0].returncode, err, time.time(), job.folder)


@pytest.mark.parametrize("late", [0, 1])
def test_a_stopped_rank_is_named_and_the_job_ends(late: int, jobs) -> None:
    job = jobs[f"rank {late} stopped"]
    assert job.code == 1
    assert job.err.startswith(f"error: no progress within 2 s (run.stall_limit_s, run.timeout_s): rank {late} (")
    assert "is in rollout after step 0" in job.err
    assert "stopped by a signal (SIGSTOP); 1 of 2 ranks wait for it; stacks: " in job.err
    assert job.err.count("\n") == 1
    assert "in stand_still" in job.stacks(late)
    assert "process state T" in job.stacks(late)
    assert "rank.py" in job.stacks(1 - late)
    assert f"rank {late} (" in (job.folder / "run" / "stall" / "report.txt").read_text()


def test_a_rank_in_a_call_that_holds_pythons_lock_is_ended(jobs) -> None:
    job = jobs["lock held"]
    assert job.code == 1
    assert "no rank is behind the others; rank 0 (" in job.err
    assert "in hold_the_lock" in job.stacks(1)


def test_a_rank_that_goes_on_is_left_alone(jobs) -> None:
    """Several times the limit, in phases that are shorter."""
    job = jobs["goes on"]
    assert (job.code, job.err) == (0, "")
    heartbeat = read_heartbeat(job.folder / "run", 0)
    assert heartbeat is not None
    assert heartbeat.phase == "update"
    assert 1 <= heartbeat.steps_done <= 8
    assert not (job.folder / "run" / "stall").exists()


def test_a_collective_that_timed_out_names_the_late_rank_too(jobs) -> None:
    job = jobs["collective timed out"]
    assert job.code == 1
    assert "error: a rank waited for the others longer than run.timeout_s = 1 s: rank 1 (" in job.err
    assert "is in rollout" in job.err
    assert "Timed out waiting" in job.stacks(0)


def test_a_rank_whose_node_is_lost_is_named_by_another_node(jobs) -> None:
    job = jobs["node lost"]
    assert job.code == -signal.SIGKILL
    assert "no progress within 2 s (run.stall_limit_s, run.timeout_s): rank 0 (" in job.err
    assert "and silent since: its node is down" in job.err


@pytest.mark.parametrize("launcher", ["", ", torchrun"])
def test_a_rank_that_is_stopped_with_its_guard_is_ended_by_anothers(launcher: str, jobs) -> None:
    """Signals to stop reach a process group: torchrun alone would give the stopped rank 30 s, our launcher 17."""
    job = jobs[f"rank and guard stopped{launcher}"]
    assert job.code == 1
    assert "rank 1 (" in job.err
    assert "and silent since: its node is down or does not reach the run folder; 1 of 2 ranks wait for it" in job.err
    # torchrun's words where it has waited these 30 s.
    assert "forcefully exiting" not in job.err
    for pid in (int(number) for number in (job.folder / "stopped").read_text().split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(30)


def test_a_folder_that_hangs_keeps_no_rank_from_its_end(jobs) -> None:
    job = jobs["folder hangs"]
    assert job.code == 1
    line = next(line for line in job.err.splitlines() if line.startswith("error: "))
    assert "(run.stall_limit_s, run.timeout_s): rank " in line
    assert "is in checkpoint after step 0" in line
    assert (
        "/run does not answer (a file system that hangs?), so nothing is known of other ranks; stacks: in this " in line
    )
    assert 'rank.py", line' in job.err


def test_an_output_that_takes_nothing_keeps_no_rank_from_its_end(jobs) -> None:
    job = jobs["output is full"]
    assert job.code == -signal.SIGKILL
    assert (
        ": rank 1 has not started; 1 of 2 ranks wait for it"
        in (job.folder / "run" / "stall" / "report.txt").read_text()
    )


def test_jobs_end_soon_after_the_limit(jobs) -> None:
    stopped = {name: job for name, job in jobs.items() if (job.folder / "stopped").exists()}
    ended = {name: job.seconds_after_the_limit for name, job in stopped.items()}
    assert len(ended) == 7
    assert max(ended.values()) < TO_END_S, ended


def test_a_crash_leaves_its_stacks(jobs) -> None:
    job = jobs["crash"]
    assert job.code == -signal.SIGABRT
    assert "crashed in sync after step 0" in job.stacks(1)
    assert "in crash" in job.stacks(1)
    assert "rank 1 crashed; stacks: " in job.err


def test_without_a_limit_there_is_no_guard(tmp_path: Path) -> None:
    run = SimpleNamespace(dir=str(tmp_path), name="run", stall_limit_s=0.0, timeout_s=600.0)
    with Watchdog(run, SimpleNamespace(rank=0, local_rank=0, world_size=1)) as watchdog:
        watchdog.enter("rollout")
        watchdog.step_done(1)
    assert not (tmp_path / "run").exists()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_in_which_the_guard_was_stopped_too_does_not_count(tmp_path: Path) -> None:
    """A scheduler that suspends a job and lets it go on stops guards as well."""
    fd = os.memfd_create("position")
    SharedPosition(fd).write(Position(phase="rollout", is_starting=False))
    clock = Clock()
    settings = GuardSettings(str(tmp_path), 0, 0, 1, os.getpid(), 30.0, 600.0, fd, fd)
    guard = Guard(settings, clock)
    for _ in range(8):
        clock.now += POLL_S
        guard._look()
    clock.now += 1000.0
    guard._look()
    assert guard._cause() == ""
    clock.now += 27.0 - SUSPENDED_S
    guard._look()
    assert guard._cause() == ""
    for _ in range(60):
        clock.now += 0.5
        guard._look()
    assert guard._cause() == "no progress within run.stall_limit_s = 30 s"
    os.close(fd)


def test_before_the_first_step_is_done_the_longer_limit_counts(tmp_path: Path) -> None:
    fd = os.memfd_create("position")
    shared, clock = SharedPosition(fd), Clock()
    shared.write(Position(phase="engine"))
    guard = Guard(GuardSettings(str(tmp_path), 0, 0, 1, os.getpid(), 30.0, 60.0, fd, fd), clock)
    causes = []
    for seconds in (31, 61):
        clock.now = 100.0 + seconds
        guard._woken = clock.now - POLL_S
        guard._look()
        causes.append(guard._cause())
    assert causes == ["", "no progress within 60 s (run.stall_limit_s, run.timeout_s)"]
    os.close(fd)


def test_heartbeats_and_positions_survive_bad_files(tmp_path: Path) -> None:
    assert read_heartbeat(tmp_path, 0) is None
    heartbeat_path(tmp_path, 0).parent.mkdir()
    for text in ("", "{", '{"rank": 0}', "[1]"):
        heartbeat_path(tmp_path, 0).write_text(text)
        assert read_heartbeat(tmp_path, 0) is None


def test_what_counts_as_a_timeout() -> None:
    assert _is_timeout(RuntimeError("Timed out waiting 1000ms for send operation"))
    assert _is_timeout(RuntimeError("Application timeout caused pair closure"))
    assert not _is_timeout(RuntimeError("Connection closed by peer"))
    assert not _is_timeout(ValueError("timeout"))
