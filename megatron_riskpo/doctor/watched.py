"""Communication that may hang, done stage by stage on all ranks of a job: who keeps the others waiting is named.

Collectives themselves do not say it: NCCL's wait, gloo's give up without a name. So they run on a thread, and each
rank's main thread tells the store where that thread is, and that the rank is alive.
"""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from megatron_riskpo.distributed.patient_thread import PatientThread
from megatron_riskpo.doctor.meeting import GRACE_S, Meeting, SharedError
from megatron_riskpo.errors import RunError

T = TypeVar("T")
_TELL_S = 0.5
_SILENT_S = 3.0
"""A rank that has told nothing for so long is stopped, or gone."""
_STORE_S = 5.0
_MAX_NAMED = 16
REMEDY = (
    "see its output, nvidia-smi and dmesg there, NCCL_DEBUG=INFO for the network that NCCL takes; leave the node out "
    "(sbatch --exclude), or raise --timeout"
)


@dataclass(frozen=True)
class Progress:
    """Where a rank is, as it tells."""

    stage: int = -1
    """Index of the stage that it has entered last; -1: none."""
    beats: int = 0
    """Times that it has told."""
    error: str = ""
    """With which its communication ended."""
    is_done: bool = False


class Stages:
    """What the communicating thread enters."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.since = time.monotonic()

    def enter(self, name: str) -> None:
        """The same names in the same order on every rank."""
        self.names.append(name)
        self.since = time.monotonic()


def watched(meeting: Meeting, name: str, work: Callable[[Callable[[str], None]], T]) -> list[T]:
    """What `work` returns on every rank, JSON's types. It is called on a thread, with a function that it calls with the
    name of each stage it enters. Raises SharedError, on every rank, where a stage takes longer than the meeting's
    timeout or `work` fails, and names the ranks that are to blame; RunError where rank 0 does not answer."""
    return _Watch(meeting, name, work).run()


class _Watch:
    """One rank's side."""

    def __init__(self, meeting: Meeting, name: str, work: Callable[[Callable[[str], None]], Any]) -> None:
        self._meeting, self._name, self._stages = meeting, name, Stages()
        self._store = PatientThread(_STORE_S)
        self._work: Future[Any] = PatientThread(0.0).begin(lambda: work(self._stages.enter))
        self._beats = 0

    def run(self) -> list[Any]:
        while not self._is_done and not self._knows("missing"):
            self._tell()
            late = time.monotonic() - self._stages.since - self._meeting.timeout_s
            if self._meeting.env.rank == 0:
                if late > 0 or self._knows("progress/failed"):
                    raise self._judgement()
            elif late > GRACE_S or self._store.hangs:
                raise self._rank_0_is_silent()
            time.sleep(_TELL_S)
        self._tell()
        return self._meeting.collect(self._name, self._work.result() if self._is_done else None)

    @property
    def _is_done(self) -> bool:
        return self._work.done() and self._work.exception() is None

    def _knows(self, what: str) -> bool:
        """Whether a rank has said so to the store."""
        return self._store.do(lambda: self._meeting.store.check([f"{self._name}/{what}"]), False)

    def _tell(self) -> None:
        error = self._work.exception() if self._work.done() else None
        self._beats += 1
        stage = len(self._stages.names) - (not self._is_done)
        told = Progress(stage, self._beats, _one_line(error) if error else "", self._is_done)
        self._set(f"progress/{self._meeting.env.rank}", asdict(told))
        if error:
            self._set("progress/failed", "")

    def _set(self, what: str, value: Any) -> None:
        self._store.do(lambda: self._meeting.store.set(f"{self._name}/{what}", json.dumps(value)), None)

    def _judgement(self) -> SharedError:
        """Rank 0 looks twice, and tells all."""
        before = self._progress()
        until = time.monotonic() + _SILENT_S
        while time.monotonic() < until:
            self._tell()
            time.sleep(_TELL_S)
        hosts, timeout_s = self._meeting.hosts or [], self._meeting.timeout_s
        words = f"{self._name}: {blame(before, self._progress(), self._stages.names, hosts, timeout_s)}; {REMEDY}"
        # Where `collect` looks, in which ranks that are done wait.
        self._set("missing", words)
        return SharedError(words)

    def _progress(self) -> list[Progress]:
        store, found = self._meeting.store, []
        for rank in range(self._meeting.env.world_size):
            key = f"{self._name}/progress/{rank}"
            found.append(Progress(**json.loads(store.get(key))) if store.check([key]) else Progress())
        return found

    def _rank_0_is_silent(self) -> RunError:
        stage = self._stages.names[-1] if self._stages.names else "its start"
        host = (self._meeting.hosts or ["?"])[0]
        return RunError(f"{self._name}: rank 0 ({host}) does not answer any more; this rank is in {stage}; {REMEDY}")


def blame(
    before: Sequence[Progress], after: Sequence[Progress], stages: Sequence[str], hosts: Sequence[str], timeout_s: float
) -> str:
    """Who keeps the others waiting: the first of these that is true of any rank: it tells nothing any more; it is
    behind the others by a stage; its communication failed. `before` and `after`: of all ranks, seconds apart;
    `stages`: those that rank 0 has entered. Pure."""
    ranks = range(len(after))
    silent = [rank for rank in ranks if after[rank].beats == before[rank].beats and not after[rank].is_done]
    first = max(progress.stage for progress in after)
    behind = [rank for rank in ranks if after[rank].stage < first]
    failed = [rank for rank in ranks if after[rank].error]
    late = silent or behind or failed
    place = _stage(min(after[rank].stage for rank in late or ranks), stages)
    if silent:
        return f"in {place} {_names(silent, hosts)} not answer any more: stopped, or lost with the node"
    error = next((f": {after[rank].error}" for rank in late if after[rank].error), "")
    if error:
        return f"{_names(late, hosts)} not get through {place}{error}"
    if behind:
        return f"{_names(behind, hosts)} not get through {place} within {timeout_s:g} s, others do"
    return f"no rank gets through {place} within {timeout_s:g} s"


def _names(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks[:_MAX_NAMED])
    more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"ranks {named}{more} do" if len(ranks) > 1 else f"rank {named} does"


def _stage(index: int, stages: Sequence[str]) -> str:
    if index < 0:
        return "the start"
    return stages[index] if index < len(stages) else "a later stage"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
