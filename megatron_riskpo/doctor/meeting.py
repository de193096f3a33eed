"""All ranks of a job, and what each of them has to say, through torch's store: a rank that does not come is named."""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megatron_riskpo.distributed.launch import RankEnv, all_hosts
from megatron_riskpo.distributed.patient_thread import PatientThread
from megatron_riskpo.errors import RunError, one_line

_POLL_S = 0.05
GRACE_S = 10.0
"""How much longer than rank 0 the others wait: it says who is missing."""
_PART_S = 5.0
"""So long rank 0, whose process holds the store, stays for those that have still to read."""
MAX_ERROR = 200
"""Characters of another library's error that go into a line."""


class SharedError(RunError):
    """Raised with the same words on every rank: one of them need say it."""


@dataclass
class Meeting:
    """One rank's place in it."""

    store: Any
    env: RankEnv
    timeout_s: float
    hosts: list[str] | None = None
    """Of the ranks, once they are known."""

    def __post_init__(self) -> None:
        # torch's store waits for ever for one that is stopped, whatever the time-out.
        self._thread = PatientThread(self.timeout_s + 2 * GRACE_S)

    def collect(self, stage: str, value: Any) -> list[Any]:
        """Every rank's value, JSON's types, on every rank. Raises SharedError that names those from which
        nothing came within the time."""
        own = self.env.rank
        self.store.set(f"{stage}/{own}", json.dumps(value))
        if own == 0:
            missing = self._wait_for_all(stage)
            self.store.set(f"{stage}/missing", json.dumps(self._complaint(stage, missing) if missing else ""))
        try:
            outcome = self._thread.do(lambda: self._outcome(stage), None)
        except RuntimeError as error:
            said = one_line(error, MAX_ERROR)
            raise RunError(f"{stage}: rank 0 does not answer any more ({said}); see its output") from error
        if outcome is None:
            raise RunError(f"{stage}: rank 0 does not answer any more: stopped, or lost with its node; see its output")
        if outcome[0]:
            raise SharedError(outcome[0])
        return outcome[1]

    def _outcome(self, stage: str) -> tuple[str, list[Any]]:
        """What rank 0 complains of, or every rank's value."""
        self.store.wait([f"{stage}/missing"], timedelta(seconds=self.timeout_s + GRACE_S))
        complaint = json.loads(self.store.get(f"{stage}/missing"))
        ranks = range(0 if complaint else self.env.world_size)
        return complaint, [json.loads(self.store.get(f"{stage}/{rank}")) for rank in ranks]

    def part(self) -> None:
        """The end of it; rank 0 goes last, but waits for nobody that is stopped."""
        with contextlib.suppress(RuntimeError):
            PatientThread(_PART_S).do(self._part, None)

    def _part(self) -> None:
        others = self.env.world_size - 1
        if self.env.rank:
            self.store.add("parted", 1)
            return
        deadline = time.monotonic() + _PART_S
        while self.store.add("parted", 0) < others and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _wait_for_all(self, stage: str) -> list[int]:
        """The ranks that did not come."""
        deadline = time.monotonic() + self.timeout_s
        missing = list(range(self.env.world_size))
        while True:
            missing = [rank for rank in missing if not self.store.check([f"{stage}/{rank}"])]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(_POLL_S)

    def _complaint(self, stage: str, missing: list[int]) -> str:
        if self.hosts is not None:
            names = ", ".join(f"{rank} ({self.hosts[rank]})" for rank in missing[:16])
            return (
                f"{stage}: nothing came from rank{'s' * (len(missing) > 1)} {names} within {self.timeout_s:g} s; look "
                "for a hung driver or file system there (dmesg, ls of the run folder), or raise --timeout"
            )
        came = [rank for rank in range(self.env.world_size) if rank not in missing]
        hosts = sorted({json.loads(self.store.get(f"{stage}/{rank}")) for rank in came})
        absent = [host for host in step_hosts() if host not in hosts]
        where = f"; no rank came from {', '.join(absent[:16])}" if absent else ""
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:32]))}"
        return (
            f"{len(came)} of {self.env.world_size} ranks came within {self.timeout_s:g} s, from "
            f"{', '.join(hosts[:16])}; {ranks} did not{where}; look at their output, or leave their nodes out (sbatch "
            "--exclude)"
        )


def meet(env: RankEnv, timeout_s: float, host: str) -> Meeting:
    """Connect to rank 0's store and call the roll. Raises RunError: rank 0, or others, did not come within the time."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent holds the store at this address itself.
    is_master = env.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    try:
        store = dist.TCPStore(
            address, port, None, is_master, timedelta(seconds=timeout_s), wait_for_workers=False,
            master_listen_fd=env.store_fd,
        )  # fmt: skip
    except (dist.DistStoreError, dist.DistNetworkError, RuntimeError) as error:
        doing = "cannot listen" if is_master else "rank 0 does not answer"
        raise RunError(
            f"{doing} at {address}:{port} within {timeout_s:g} s (from {host}: {one_line(error, MAX_ERROR)}); see "
            "whether rank 0 started, and whether a firewall lies between"
        ) from error
    meeting = Meeting(dist.PrefixStore("riskpo-doctor", store), env, timeout_s)
    meeting.hosts = meeting.collect("roll call", host)
    return meeting


def step_hosts() -> list[str]:
    """Of the Slurm step that this process is in; none elsewhere, or where Slurm does not say."""
    nodelist = os.environ.get("SLURM_STEP_NODELIST")
    try:
        return all_hosts(nodelist) if nodelist else []
    except RunError:
        return []
