"""Ranks: which one this process is (torchrun, srun, or a child of ours), the default process group, and the launcher
with which a bare `riskpo train` starts its own ranks on this machine. Imports no torch (see signals.py)."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

from megatron_riskpo.distributed.signals import STOP_SIGNALS
from megatron_riskpo.errors import RunError, UsageError

# Set by `launch` for its children, read once, in this module.
_STORE_FD = "RISKPO_STORE_FD"
_ERROR_FD = "RISKPO_ERROR_FD"
_LAUNCHER_PID = "RISKPO_LAUNCHER_PID"

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

POLL_S = 0.05
# After the first failure the other ranks may end, and say why, by themselves for so long, in seconds.
SETTLE_S = 2.0


@dataclass(frozen=True)
class RankEnv:
    """This process among the ranks of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank on this machine: the index of its GPU."""
    self_launched: bool = False
    """Started by `launch`, which holds the rendezvous port."""
    store_fd: int | None = None
    """Rank 0 of a self-launched run: the listening socket of the rendezvous."""


def process_env(environ: MutableMapping[str, str] = os.environ) -> RankEnv | None:
    """This process's rank under torchrun, srun or `launch`; None in a bare process.

    Under srun, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are written to `environ`, where torch and
    vLLM look for them. Raises UsageError on a half-set environment.
    """
    # A batch script and `srun --pty bash` have Slurm's variables too, but are no ranks: they have one task or no step.
    if "RANK" not in environ and "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _adopt_slurm(environ)
    if "RANK" not in environ:
        return None
    missing = [name for name in _TORCHRUN_VARIABLES if name not in environ]
    if missing:
        raise UsageError(
            f"RANK is set in the environment but {', '.join(missing)} not; start with torchrun or srun, or unset RANK"
        )
    try:
        rank, world_size, local_rank = (int(environ[name]) for name in _TORCHRUN_VARIABLES[:3])
    except ValueError as error:
        raise UsageError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers: {error}") from None
    if not 0 <= rank < world_size:
        raise UsageError(f"RANK = {rank} is not within WORLD_SIZE = {world_size}; check the launcher's environment")
    fd = environ.get(_STORE_FD)
    return RankEnv(rank, world_size, local_rank, _LAUNCHER_PID in environ, None if fd is None else int(fd))


def _adopt_slurm(environ: MutableMapping[str, str]) -> None:
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
    if "MASTER_PORT" not in environ:
        # The same on all ranks, another one for each job step, below the ports that the kernel hands out itself.
        job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
        environ["MASTER_PORT"] = str(10000 + (job * 31 + step) % 20000)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list such as n[03-07,9],m1."""
    first = re.match(r"[^,\[]+(?=,|$)", nodelist)
    return first[0] if first else all_hosts(nodelist)[0]


def all_hosts(nodelist: str) -> list[str]:
    """The hosts of a Slurm node list, in its order. Raises RunError where scontrol does not expand it."""
    if "[" not in nodelist:
        return nodelist.split(",")
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(
            f"scontrol could not expand {nodelist} ({error}); export MASTER_ADDR as its first host"
        ) from error
    return done.stdout.split()


def init_process_group(env: RankEnv, timeout_s: float, *, on_cpu: bool = False, store: Any = None) -> None:
    """Initialise torch's default group: gloo for CPU tensors and, where there is a GPU, NCCL for GPU tensors; gloo
    alone with on_cpu, whatever GPUs there are.

    `timeout_s`, in seconds, bounds the rendezvous and every collective. `store`: one that all ranks are connected to,
    in place of a rendezvous. Raises RunError if there are fewer GPUs than local ranks.
    """
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available() and not on_cpu:
        torch.cuda.set_device(gpu_of(env, torch.cuda.device_count()))
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    if store is None and env.self_launched:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            env.world_size,
            is_master=env.rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=env.store_fd,
        )
    dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world_size, timeout=timeout)


def gpu_of(env: RankEnv, num_gpus: int) -> int:
    """The index of the rank's GPU among those that it sees. Raises RunError where there are too few."""
    if env.local_rank < num_gpus:
        return env.local_rank
    # Slurm's GPU binding and CUDA_VISIBLE_DEVICES per task show each rank one GPU, its own.
    if num_gpus == 1 and not env.self_launched:
        return 0
    raise RunError(
        f"rank {env.rank} needs GPU {env.local_rank}, but {num_gpus} are visible; start at most {num_gpus} ranks"
    )


def die_with_launcher() -> None:
    """Called first in a rank: if `launch` started this process, have the kernel kill it when the launcher dies."""
    launcher = os.environ.get(_LAUNCHER_PID)
    if launcher is not None:
        die_with_parent(int(launcher))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, of that process id, dies (Linux; elsewhere nothing)."""
    if sys.platform != "linux":
        return
    signal_when_parent_dies(signal.SIGKILL)
    if os.getppid() != parent:
        # It died before the line above.
        os._exit(1)


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <linux/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(number), 0, 0, 0)


def child_environment() -> dict[str, str]:
    """For a process that this one starts to be no rank, but to end with it (`die_with_launcher`)."""
    rank_variables = (*_TORCHRUN_VARIABLES, "LOCAL_WORLD_SIZE", _STORE_FD, _ERROR_FD)
    environment = {name: value for name, value in os.environ.items() if name not in rank_variables}
    # Slurm's variables of the step would make it a rank again.
    environment = {name: value for name, value in environment.items() if not name.startswith("SLURM_")}
    return environment | {_LAUNCHER_PID: str(os.getpid())}


def report_error(message: str, exit_code: int, *, expected: bool) -> None:
    """Tell the user of an error, in one line. Under `launch` the launcher prints it, once for all ranks.

    expected: an error meant for the user, not a consequence of another rank's death.
    """
    fd = os.environ.get(_ERROR_FD)
    if fd is None:
        rank = os.environ.get("RANK", "0")
        print(f"error: {'' if rank == '0' else f'rank {rank}: '}{message}", file=sys.stderr, flush=True)
        return
    # Below PIPE_BUF, so that the line arrives whole.
    report = {"at": time.monotonic(), "message": message[:1000], "exit_code": exit_code, "expected": expected}
    os.write(int(fd), json.dumps(report).encode() + b"\n")


def inherited_fds() -> list[int]:
    """What a process needs to have passed on that `report_error` is called in for this rank."""
    fd = os.environ.get(_ERROR_FD)
    return [] if fd is None else [int(fd)]


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    error_fd: int
    """Read end, not blocking."""
    report: dict[str, Any] | None = None
    failed_at: float | None = None
    """When the launcher saw it fail (time.monotonic)."""

    def observe(self) -> None:
        """Take its report, if any, and note a failure."""
        code = self.process.poll()
        if self.report is None:
            try:
                line = os.read(self.error_fd, 65536).partition(b"\n")[0]
            except BlockingIOError:
                line = b""
            self.report = json.loads(line) if line else None
        if self.failed_at is None and (code or self.report):
            self.failed_at = self.report["at"] if self.report else time.monotonic()

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    @property
    def is_stopped(self) -> bool:
        """By a signal (SIGSTOP): no other one but SIGKILL is heard."""
        return os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """End it and what it has started (graders, compilers): they share its session."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


@dataclass
class _Relay:
    """Passes the stop signals that the launcher gets to its children."""

    children: list[_Child]
    received: list[int] = field(default_factory=list)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        for child in self.children:
            child.send(number)

    @property
    def interrupted_twice(self) -> bool:
        return self.received.count(signal.SIGINT) > 1


def launch(command: Sequence[str], num_ranks: int, *, grace_s: float = 15.0) -> int:
    """Run `command` as ranks 0 .. num_ranks - 1 on this machine until all have ended; the exit code.

    0 if all ranks ended so; else the code of the rank that failed first (128 + n for one killed by signal n), and one
    line on stderr says why. After a failure the other ranks get SIGTERM and, grace_s seconds later, SIGKILL; those that
    are stopped, SIGKILL at once. SIGTERM, SIGINT and SIGUSR1 are passed on; a second SIGINT kills. The children must
    call die_with_launcher().
    """
    children: list[_Child] = []
    relay = _Relay(children)
    with _handlers(relay), socket.create_server(("127.0.0.1", 0), backlog=max(128, num_ranks)) as listener:
        try:
            for rank in range(num_ranks):
                children.append(_start(command, rank, num_ranks, listener))
            for number in relay.received:
                relay.handle(number, None)
            _wait(children, relay, grace_s)
        finally:
            for child in children:
                if child.running or child.process.returncode:
                    child.kill()
                child.process.wait()
                os.close(child.error_fd)
    return _outcome(children, relay)


@contextmanager
def _handlers(relay: _Relay) -> Iterator[None]:
    before = {number: signal.signal(number, relay.handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: Sequence[str], rank: int, num_ranks: int, listener: socket.socket) -> _Child:
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    environment = {
        # One thread a rank unless the user says otherwise: ranks share the cores, spinning threads starve each other.
        "OMP_NUM_THREADS": "1",
        # All ranks are here; without it gloo looks the host's name up, which many machines cannot.
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        _LAUNCHER_PID: str(os.getpid()),
        _ERROR_FD: str(write_fd),
    }
    fds = [write_fd]
    if rank == 0:
        # The listening socket itself is handed over: a port that is only named may be taken in between.
        environment[_STORE_FD] = str(listener.fileno())
        fds.append(listener.fileno())
    try:
        # Own session: a terminal's Ctrl-C reaches the launcher alone, which passes it on once.
        process = subprocess.Popen(command, env=environment, pass_fds=fds, start_new_session=True)
    except OSError:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    return _Child(rank, process, read_fd)


def _wait(children: list[_Child], relay: _Relay, grace_s: float) -> None:
    """Until all have ended. The first failure, or a second SIGINT, starts the countdown for the others."""
    terminated = False
    while True:
        for child in children:
            child.observe()
        running = [child for child in children if child.running]
        failures = [child.failed_at for child in children if child.failed_at is not None]
        if not running:
            return
        waited = time.monotonic() - min(failures) if failures else 0.0
        if waited > SETTLE_S and not terminated:
            terminated = True
            for child in running:
                if child.is_stopped:
                    child.kill()
                else:
                    child.send(signal.SIGTERM)
        if relay.interrupted_twice or waited > SETTLE_S + grace_s:
            # Those that a handler can reach get the time to run it.
            time.sleep(POLL_S)
            for child in running:
                child.kill()
        time.sleep(POLL_S)


def _outcome(children: list[_Child], relay: _Relay) -> int:
    if relay.interrupted_twice:
        return 130
    failed = [child for child in children if child.failed_at is not None]
    if not failed:
        return 0
    first = min(failed, key=lambda child: (child.failed_at or 0.0, child.rank))
    for line in _messages(children, first, relay):
        print(f"error: {line}", file=sys.stderr, flush=True)
    if first.report:
        return first.report["exit_code"]
    code = first.process.returncode
    return code if code > 0 else 128 - code


def _messages(children: list[_Child], first: _Child, relay: _Relay) -> list[str]:
    """What the user should know, each thing once: how `first` ended, and every expected error. Another rank's
    unexpected error is left out: it is most likely the loss of its peer."""
    lines = [] if first.report else [_silent_end(first, relay)]
    reports = [child.report | {"rank": child.rank} for child in children if child.report]
    told = [report for report in reports if report["expected"]]
    if first.report and not told:
        told = [report for report in reports if report["message"] == first.report["message"]]
    ranks: dict[str, list[int]] = {}
    for report in sorted(told, key=lambda report: report["at"]):
        ranks.setdefault(report["message"], []).append(report["rank"])
    # Rank 0 speaks for all.
    return lines + [message if 0 in who else f"rank {min(who)}: {message}" for message, who in ranks.items()]


def _silent_end(child: _Child, relay: _Relay) -> str:
    code = child.process.returncode
    if code > 0:
        return f"rank {child.rank} ended with exit code {code} and no message; see the output above"
    name = signal.Signals(-code).name
    if -code in relay.received:
        return f"stopped by {name} before the run had begun; nothing was written"
    hint = "; out of memory? lower the batch or the model" if -code == signal.SIGKILL else ""
    return f"rank {child.rank} was killed by {name}{hint}"
