"""Communication that may hang, done stage by stage on all ranks of a job: who keeps the others waiting is named.

Collectives themselves do not say it: NCCL's wait, gloo's give up without a name. So they run on a thread, and each
rank's main thread tells the store where that thread is, and that the rank is alive. Rank 0 judges.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeVar

from megatron_riskpo.distributed.patient_thread import PatientThread
from megatron_riskpo.doctor.blame import Progress, blame
from megatron_riskpo.doctor.meeting import MAX_ERROR, Meeting, SharedError
from megatron_riskpo.errors import RunError, one_line

T = TypeVar("T")
_TELL_S = 0.5
_SILENT_S = 5.0
"""A rank that has told nothing for so long is stopped, or gone."""
_STORE_S = 30.0
"""So long rank 0, whose process holds the store, may answer nothing and tell nothing: others have nobody else.
torch's store looks up the name of whoever connects, which takes seconds where no name server answers."""
REMEDY = (
    "see its output, nvidia-smi and dmesg there, NCCL_DEBUG=INFO for the network that NCCL takes; leave the node out "
    "(sbatch --exclude), or raise --timeout"
)


class Stages:
    """What the communicating thread enters."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.since = time.monotonic()

    def enter(self, name: str) -> None:
        """The same names in the same order on every rank."""
        self.names.append(name)
        self.since = time.monotonic()


def watched(meeting: Meeting, name: str, work: Callable[[Callable[[str], None], Any], T]) -> list[T]:
    """What `work` returns on every rank, JSON's types. It is called on a thread, with a function that it calls with the
    name of each stage it enters, and with a store of its own. Raises SharedError, on every rank, where a stage takes
    longer than the meeting's timeout or `work` fails, and names the ranks that are to blame; RunError where rank 0 does
    not answer."""
    return _Watch(meeting, name, work).run()


class _Watch:
    """One rank's side."""

    def __init__(self, meeting: Meeting, name: str, work: Callable[[Callable[[str], None], Any], Any]) -> None:
        self._meeting, self._name, self._stages = meeting, name, Stages()
        # A connection of its own: one that waits for a key lets no other thread ask.
        own = meeting.store.clone()
        self._store = PatientThread(_STORE_S)
        self._work: Future[Any] = PatientThread(0.0).begin(lambda: work(self._stages.enter, own))
        self._told = Progress()
        self._heard, self._heard_at = Progress(), time.monotonic()
        """Of rank 0."""

    def run(self) -> list[Any]:
        judges = self._meeting.env.rank == 0
        while True:
            self._tell()
            if self._all_are_done() if judges else self._knows("missing"):
                return self._meeting.collect(self._name, self._work.result() if self._told.is_done else None)
            if judges and (self._is_late or self._knows("failures")):
                raise self._judgement()
            if not judges:
                self._listen()
            time.sleep(_TELL_S)

    @property
    def _is_late(self) -> bool:
        return time.monotonic() - self._stages.since > self._meeting.timeout_s

    def _tell(self) -> None:
        stage, told = len(self._stages.names), self._told
        is_done, error, failed_as = told.is_done, told.error, told.failed_as
        if self._work.done() and not (is_done or error):
            cause = self._work.exception()
            if cause is None:
                is_done, self._stages.since = True, time.monotonic()
                # Where `collect` looks.
                self._set(str(self._meeting.env.rank), self._work.result())
            else:
                error = one_line(cause, MAX_ERROR) or type(cause).__name__
                failed_as = self._ask(lambda store: store.add(f"{self._name}/failures", 1), 0)
        self._told = Progress(stage - (not is_done), told.beats + 1, error, failed_as, is_done)
        self._set(f"progress/{self._meeting.env.rank}", asdict(self._told))

    def _listen(self) -> None:
        """Raises RunError where rank 0 has told nothing for too long."""
        heard = self._ask(lambda store: self._progress(store, 0), self._heard)
        if heard.beats != self._heard.beats:
            self._heard, self._heard_at = heard, time.monotonic()
        elif time.monotonic() - self._heard_at > _STORE_S:
            raise self._rank_0_is_silent()

    def _all_are_done(self) -> bool:
        keys = [f"{self._name}/{rank}" for rank in range(self._meeting.env.world_size)]
        return self._ask(lambda store: store.check(keys), False)

    def _knows(self, what: str) -> bool:
        """Whether a rank has said so to the store."""
        return self._ask(lambda store: store.check([f"{self._name}/{what}"]), False)

    def _set(self, what: str, value: Any) -> None:
        self._ask(lambda store: store.set(f"{self._name}/{what}", json.dumps(value)), None)

    def _ask(self, question: Callable[[Any], T], otherwise: T) -> T:
        """The store. Raises RunError where it does not answer."""
        try:
            answer = self._store.do(lambda: question(self._meeting.store), otherwise)
        except RuntimeError as error:
            raise self._rank_0_is_silent() from error
        if self._store.hangs:
            raise self._rank_0_is_silent()
        return answer

    def _judgement(self) -> SharedError:
        """Rank 0 looks twice, and tells all."""
        before = self._look()
        until = time.monotonic() + _SILENT_S
        while time.monotonic() < until:
            self._tell()
            time.sleep(_TELL_S)
        hosts, timeout_s = self._meeting.hosts or [], self._meeting.timeout_s
        words = f"{self._name}: {blame(before, self._look(), self._stages.names, hosts, timeout_s)}; {REMEDY}"
        # Where `collect` looks, in which the others end.
        self._set("missing", words)
        return SharedError(words)

    def _look(self) -> list[Progress]:
        ranks = range(self._meeting.env.world_size)
        return self._ask(lambda store: [self._progress(store, rank) for rank in ranks], [])

    def _progress(self, store: Any, rank: int) -> Progress:
        key = f"{self._name}/progress/{rank}"
        return Progress(**json.loads(store.get(key))) if store.check([key]) else Progress()

    def _rank_0_is_silent(self) -> RunError:
        stage = self._stages.names[-1] if self._stages.names else "its start"
        host = (self._meeting.hosts or ["?"])[0]
        return RunError(f"{self._name}: rank 0 ({host}) does not answer any more; this rank is in {stage}; {REMEDY}")
