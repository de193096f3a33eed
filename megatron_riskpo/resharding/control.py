"""What ranks say to each other around a push, with a deadline that names who is missing.

All tell rank 0, which so knows who has not come, and tells all. The first wait that runs out has gloo close all links
of a group: what rank 0 knows then goes through the store. Where the store does not say it, it is rank 0 itself that is
missing.
"""

import json
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.distributed.patient_thread import in_time
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports.base import Parcel, PeerError, reason_of
from megatron_riskpo.resharding.transports.gloo import GlooRound, GlooTransport

Item = TypeVar("Item")

_ANSWER_S = 1.0
"""For rank 0's answer, once it has heard of all, or its time is up."""


class LostRankError(RunError):
    """A rank does not come: there is nothing more that the others could do together."""


class Control:
    """Small CPU messages over a gloo group."""

    def __init__(
        self, group: dist.ProcessGroup, timeout_s: float, *, subject: str = "weight push",
        option: str = "bridge.timeout_s",
    ) -> None:  # fmt: skip
        """`subject` and `option`: what errors are about, and which option says how long to wait."""
        self.group = group
        self.timeout_s = timeout_s
        self._subject, self._option = subject, option
        self._transport = GlooTransport(group)
        self._num_gathers = 0

    @classmethod
    def of_all(cls, timeout_s: float, **names: str) -> "Control":
        """Over a group of its own, of all ranks. Collective."""
        return cls(dist.new_group(backend="gloo"), timeout_s, **names)  # type: ignore[arg-type]

    def gather(self, value: int, phase: str) -> list[int]:
        """Every rank's value; LostRankError, on every rank, where one does not come to this point in time."""
        start = time.monotonic()
        self._num_gathers += 1
        own = torch.tensor([1, value], dtype=torch.int64)
        table = self._collect(own) if self.group.rank() == 0 else self._report(own)
        missing = (table[:, 0] == 0).nonzero().flatten().tolist()
        if missing:
            who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            raise LostRankError(
                f"{self._subject}: rank {self.group.rank()} waited {time.monotonic() - start:.1f} s for {who} "
                f"({phase}); who does not come is dead, stopped or unreachable ({self._option} = {self.timeout_s:g} s "
                "is how long to wait)"
            )
        return table[:, 1].tolist()

    def agree(self, value: int, phase: str) -> None:
        """RunError on every rank unless all give the same value."""
        refuse_differences(self.gather(value, f"{phase}, here {value}"), phase)

    def gather_objects(self, value: Any, phase: str) -> list[Any]:
        """As `gather`, of what can be pickled; a rank that is lost between two messages of it is not named."""
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self.gather(len(content), phase)
        own = torch.zeros(max(sizes), dtype=torch.uint8)
        own[: len(content)] = content
        found = [torch.empty_like(own) for _ in sizes]
        try:
            work = dist.all_gather(found, own, group=self.group, async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            self._fail(error, phase)
        return [pickle.loads(of[:size].numpy().tobytes()) for of, size in zip(found, sizes, strict=True)]

    def guarded(self, items: Iterable[Item], phase: str) -> Iterator[Item]:
        """The items, which all ranks make together by gloo's collectives, of whichever groups. Where one of those ends
        in an error, LostRankError says it, and which ranks are missing, if any are."""
        try:
            yield from items
        except torch.OutOfMemoryError:  # this rank's own
            raise
        except RuntimeError as error:
            try:
                self.gather(0, phase)
            except LostRankError as lost:
                self._fail(error, phase, f"; then {lost}")
            self._fail(error, phase)

    def _fail(self, error: RuntimeError, phase: str, what_followed: str = "") -> NoReturn:
        reason = f"{reason_of(error)}{what_followed}"
        raise LostRankError(f"{self._subject}: rank {self.group.rank()}, {phase}: {reason}") from error

    def _collect(self, own: Tensor) -> Tensor:
        """Rank 0's. int64 [ranks, 2]: whether the rank has come, and its value."""
        deadline = time.monotonic() + self.timeout_s
        others = range(1, self.group.size())
        found = [torch.zeros_like(own) for _ in others]
        receives = [self._begin([], [Parcel(rank, row)]) for rank, row in zip(others, found, strict=True)]
        nothing = torch.zeros_like(own)
        rows = [
            row if _went_through(message, deadline) else nothing for message, row in zip(receives, found, strict=True)
        ]
        table = torch.stack([own, *rows])
        answers = [self._begin([Parcel(rank, table)], []) for rank in others if table[rank, 0]]
        deadline = time.monotonic() + self.timeout_s
        are_told = [_went_through(message, deadline) for message in answers]
        if not all(table[:, 0]):
            key, content = self._key, json.dumps(table.tolist())
            _ask_store(lambda store: store.set(key, content))
            if not all(are_told):
                time.sleep(_ANSWER_S)  # the store may end with this process
        return table

    def _report(self, own: Tensor) -> Tensor:
        """As `_collect`, on the other ranks, which hear of it from rank 0."""
        table = torch.ones(self.group.size(), 2, dtype=torch.int64)
        answer, message = self._begin([], [Parcel(0, table)]), self._begin([Parcel(0, own)], [])
        has_come = _went_through(message, time.monotonic() + self.timeout_s)
        # If rank 0 has come, it takes so long at most from now on.
        if has_come and _went_through(answer, time.monotonic() + self.timeout_s + _ANSWER_S):
            return table
        key = self._key
        told = _ask_store(lambda store: _read(store, key))
        if told is not None:
            return torch.tensor(told)
        return torch.tensor([[0, 0], *[[1, 0]] * (self.group.size() - 1)])

    def _begin(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> GlooRound | None:
        """None: the link is broken."""
        try:
            return self._transport.start(sends, receives)
        except PeerError:
            return None

    @property
    def _key(self) -> str:
        return f"missing/{self.group.group_name}/{self._num_gathers}"


def _went_through(message: GlooRound | None, deadline: float) -> bool:
    if message is None:
        return False
    try:
        message.receive(deadline)
        message.drain(deadline)
    except PeerError:
        return False
    return True


def _ask_store(call: Callable[[dist.Store], Any]) -> Any:
    """What it returns; None where the store is gone, or its process has stopped: then a call never returns."""
    store = dist.distributed_c10d._get_default_store()
    try:
        return in_time(lambda: call(store), 2 * _ANSWER_S)
    except (RuntimeError, TimeoutError):
        return None


def _read(store: dist.Store, key: str) -> list[list[int]]:
    store.wait([key], timedelta(seconds=_ANSWER_S))
    return json.loads(store.get(key))


def refuse_differences(values: Sequence[int], phase: str) -> None:
    """RunError unless the ranks' values are the same."""
    if len(set(values)) > 1:
        shown = ", ".join(f"rank {rank}: {found}" for rank, found in enumerate(values[:8]))
        raise RunError(f"weight push: the ranks do not agree on {phase} ({shown})")
