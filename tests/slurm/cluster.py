"""A real Slurm on this machine: munged, slurmctld and two slurmd, n0 and n1, each with 64 CPUs and 8 GPUs on paper.

All daemons listen on loopback addresses and free ports, and live in one folder.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

REQUIRED = "RISKPO_REQUIRE_SLURM"
"""Set where the tests on a real Slurm must run: then a missing Slurm is an error, and no reason to leave them out."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONF = """
ClusterName=riskpo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# How long credentials last is also how long a requeued job waits (120 s unless said otherwise).
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool_%n
# Neither cgroups nor an MPI plugin: a container has none.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
# Nodes with more than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
EnforcePartLimits=ALL
JobRequeue=1
KillWait=60
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
# A job that has to make way gets the signal that it asked for, and GraceTime seconds.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=1000000 Gres=gpu:h100:8
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=1000000 Gres=gpu:h100:8
PartitionName=batch Nodes=n[0-1] Default=YES MaxTime=4:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=brief Nodes=n[0-1] MaxTime=4:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=3
PartitionName=urgent Nodes=n[0-1] MaxTime=4:00:00 PriorityTier=10 PreemptMode=OFF
"""
GRES = "AutoDetect=off\nNodeName=n[0-1] Name=gpu Type=h100 File={folder}/gpu[0-7]\n"


def require_slurm() -> None:
    """Leave the test out where there is no Slurm to start; fail where there has to be one."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    reason = f"{', '.join(missing)} not installed (Debian, Ubuntu: apt-get install slurm-wlm munge)" if missing else ""
    reason = reason or ("slurmd has to be started by root" if os.geteuid() else "")
    if reason and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but {reason}")
    if reason:
        pytest.skip(reason)


@dataclass
class Cluster:
    """The daemons and their clients. `environment` is what the clients, and with them jobs, get."""

    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def start(self) -> None:
        """Raises AssertionError where the nodes do not come up."""
        munge = self.folder / "munge"
        munge.mkdir(parents=True, mode=0o711)
        (self.folder / "state").mkdir()
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        conf = self.folder / "slurm.conf"
        conf.write_text(CONF.format(folder=self.folder, host=socket.gethostname().split(".")[0], ports=_free_ports(3)))
        (self.folder / "gres.conf").write_text(GRES.format(folder=self.folder))
        for index in range(8):
            # slurmd wants a character device for each GPU: these are /dev/null by another name.
            os.mknod(self.folder / f"gpu{index}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        self.environment["SLURM_CONF"] = str(conf)
        paths = {"key-file": key, **{f"{name}-file": munge / name for name in ("pid", "log", "seed")}}
        self.run("munged", "--force", f"--socket={munge / 'socket'}", *(f"--{k}={v}" for k, v in paths.items()))
        self.run("slurmctld")
        for node in ("n0", "n1"):
            self.run("slurmd", "-N", node)
        self.wait(lambda: self.run("sinfo", "--noheader", "--states=idle", "--format=%D", "--partition=batch") == "2")

    def stop(self) -> None:
        """Jobs and daemons, by the process ids that they wrote down."""
        self.run("scancel", "--user=root", check=False)
        self.wait(lambda: not self.run("squeue", "--noheader", check=False))
        for file in (*self.folder.glob("*.pid"), self.folder / "munge" / "pid"):
            os.kill(int(file.read_text()), signal.SIGTERM)
        # One that has not told the controller of its end would try for ever.
        for process in psutil.process_iter(["name", "cwd"]):
            if process.info["name"] == "slurmstepd" and Path(process.info["cwd"] or "/").is_relative_to(self.folder):
                process.kill()

    def run(self, *command: object, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """What a client prints. With a dead controller they would hang for minutes."""
        done = subprocess.run(
            ["timeout", "60", *map(str, command)], cwd=cwd, env=self.environment | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command} gave {done.returncode}: {done.stdout}"
        return done.stdout.strip()

    def submit(self, cwd: Path, *arguments: object, **variables: str) -> "Job":
        """By sbatch, from the folder `cwd`."""
        return Job(self, cwd, self.run("sbatch", "--parsable", *arguments, cwd=cwd, **variables))

    def wait(self, condition: Callable[[], object], timeout_s: float = 60, what: Callable[[], str] = str) -> None:
        """Until it holds; `what` is said where it never does."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s} s; {what()}"
            time.sleep(0.1)


@dataclass(frozen=True)
class Job:
    """A job, and the folder that it was submitted from."""

    cluster: Cluster
    folder: Path
    id: str
    """17, or 17_3 for a task of an array."""

    def shown(self, name: str) -> str:
        """One value of `scontrol show job`."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id)
        found = re.search(rf"(?:^| ){name}=(\S*)", text)
        assert found, f"{name} is not in {text}"
        return found[1]

    @property
    def state(self) -> str:
        return self.shown("JobState")

    @property
    def logs(self) -> Path:
        """The folder of its state file and its attempts."""
        return self.folder / "slurm_logs" / self.id

    def tail(self) -> str:
        """The ends of its logs, for a failing test."""
        logs = [*self.folder.glob(f"slurm-{self.id}*.log"), *sorted(self.logs.rglob("*.log"))]
        return "\n".join([f"job {self.id}", *(f"--- {log}\n{log.read_text()[-2000:]}" for log in logs)])

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 300) -> None:
        self.cluster.wait(condition, timeout_s, self.tail)

    def end(self, *expected: str) -> None:
        """Wait until it is over, in one of these states."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        self.wait_for(lambda: self.state not in running)
        assert self.state in expected, f"{self.state}: {self.tail()}"


def _free_ports(num: int) -> Sequence[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
