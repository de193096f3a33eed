"""One rank's side of a push: buckets filled, sent, received and emptied into the sink, two of them at a time.

While a bucket is on the wires the next one is filled. The extra memory is the two buckets, whatever the model's size;
it is counted, and more is an error.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.checksums import checksum
from megatron_riskpo.resharding.plan import RankPlan
from megatron_riskpo.resharding.rounds import Message, Round, make_rounds
from megatron_riskpo.resharding.transports.base import Parcel, PeerError, PendingRound, Transport
from megatron_riskpo.resharding.transports.local import copy_within_rank


class ShardSink(Protocol):
    """Takes a rank's shard, slice by slice, into parameters as vLLM stores them before it packs them."""

    def parameter(self, name: str) -> Tensor:
        """The storage to copy slices into."""
        ...

    def arrived(self, name: str, numel: int) -> None:
        """So many numbers of a parameter have been copied in."""
        ...


@dataclass(frozen=True)
class PushReport:
    """What a push did on this rank."""

    seconds: float
    bytes_received: int
    """From other ranks."""
    bytes_local: int
    """From this rank itself."""
    peak_extra_bytes: int
    """Of the buckets."""


@dataclass
class _Slot:
    """One of the two buckets, and what goes with it."""

    bucket: Tensor
    sums: Tensor
    """int64: with checksums, a sum a part, at most."""


@dataclass
class _Flight:
    """A round under way."""

    round: Round
    slot: _Slot
    pending: PendingRound
    expected: list[Tensor]
    """With checksums, the senders' sums, a tensor a received message."""


class WeightPush:
    """Made once a run: the plan does not change."""

    def __init__(
        self, plan: RankPlan, parameters: Mapping[str, Tensor], transport: Transport, *, timeout_s: float,
        with_checksums: bool = False,
    ) -> None:  # fmt: skip
        """`parameters` by their names in the family's table; `timeout_s` is the longest wait for a bucket."""
        self.plan = plan
        self.rounds = make_rounds(plan)
        self._parameters = parameters
        self._transport = transport
        self._timeout_s = timeout_s
        self._with_checksums = with_checksums

    @torch.no_grad()
    def run(self, sink: ShardSink, version: int) -> PushReport:
        """Move everything; RunError names rank, bucket and peer where a bucket does not come, or comes damaged."""
        start = time.perf_counter()
        slots = self._allocate()
        peak = sum(slot.bucket.nbytes for slot in slots)
        limit = 2 * self.plan.layout.bucket_bytes
        if peak > limit:
            raise RunError(f"weight push: the buckets of rank {self.plan.rank} take {peak} bytes, more than {limit}")
        flight: _Flight | None = None
        for index, step in enumerate(self.rounds):
            started = self._start(step, slots[index % 2], sink, version)
            if flight is not None:
                self._finish(flight, sink, version)
            flight = started
        if flight is not None:
            self._finish(flight, sink, version)
        plan = self.plan
        moved = plan.num_bytes(plan.remote)
        return PushReport(time.perf_counter() - start, moved, plan.num_bytes(plan.receives) - moved, peak)

    def _allocate(self) -> list[_Slot]:
        """Two buckets, each as large as its largest round; freed after the push: the GPU's memory is the engine's."""
        example = next(iter(self._parameters.values()))
        slots = []
        for rounds in (self.rounds[::2], self.rounds[1::2]):
            bucket = example.new_empty(max((step.numel for step in rounds), default=0))
            most = max((_num_parts(step.sends) + _num_parts(step.receives) for step in rounds), default=0)
            slots.append(_Slot(bucket, bucket.new_empty(most * self._with_checksums, dtype=torch.int64)))
        return slots

    def _start(self, step: Round, slot: _Slot, sink: ShardSink, version: int) -> _Flight:
        sends = [Parcel(message.peer, self._fill(message, slot)) for message in step.sends]
        receives = [Parcel(message.peer, _span(slot.bucket, message)) for message in step.receives]
        expected: list[Tensor] = []
        if self._with_checksums:
            sends, receives, expected = self._with_sums(step, slot, sends, receives)
        try:
            pending = self._transport.start(sends, receives)
        except RuntimeError as error:
            raise RunError(f"{self._where(version, step)} could not be sent: {error}") from error
        for part in step.local:
            storage = sink.parameter(part.target.parameter)
            copy_within_rank(part.source, self._parameters[part.source.parameter], part.target, storage)
            sink.arrived(part.target.parameter, part.numel)
        return _Flight(step, slot, pending, expected)

    def _fill(self, message: Message, slot: _Slot) -> Tensor:
        for part in message.parts:
            into = slot.bucket[part.offset : part.offset + part.numel].view(part.source.shape)
            for place, piece in part.source.copies(self._parameters[part.source.parameter], into):
                place.copy_(piece)
        return _span(slot.bucket, message)

    def _with_sums(
        self, step: Round, slot: _Slot, sends: list[Parcel], receives: list[Parcel]
    ) -> tuple[list[Parcel], list[Parcel], list[Tensor]]:
        """Each message followed by a second one with a sum a part."""
        sums = list(slot.sums.split([len(message.parts) for message in (*step.sends, *step.receives)] + [
            slot.sums.numel() - _num_parts(step.sends) - _num_parts(step.receives)]))  # fmt: skip
        for message, into in zip(step.sends, sums, strict=False):
            into.copy_(_sums_of(message, slot.bucket))
        expected = sums[len(step.sends) : len(step.sends) + len(step.receives)]
        sends = _interleaved(sends, [Parcel(m.peer, s) for m, s in zip(step.sends, sums, strict=False)])
        receives = _interleaved(receives, [Parcel(m.peer, s) for m, s in zip(step.receives, expected, strict=True)])
        return sends, receives, expected

    def _finish(self, flight: _Flight, sink: ShardSink, version: int) -> None:
        try:
            flight.pending.wait(time.monotonic() + self._timeout_s)
        except PeerError as error:
            raise RunError(
                f"{self._where(version, flight.round)} did not go through within {self._timeout_s:g} s, {error}; rank "
                f"{error.peer} is dead, stopped or unreachable (bridge.timeout_s is how long to wait)"
            ) from error
        for message, expected in zip(flight.round.receives, flight.expected, strict=False):
            self._compare(message, expected, flight, version)
        for message in flight.round.receives:
            for part in message.parts:
                piece = flight.slot.bucket[part.offset : part.offset + part.numel].view(part.source.shape)
                part.target.view(sink.parameter(part.target.parameter)).copy_(piece)
                sink.arrived(part.target.parameter, part.numel)

    def _compare(self, message: Message, expected: Tensor, flight: _Flight, version: int) -> None:
        wrong = (_sums_of(message, flight.slot.bucket) != expected).nonzero()[:, 0].tolist()
        if wrong:
            name = message.parts[wrong[0]].target.parameter
            raise RunError(
                f"{self._where(version, flight.round)} is corrupted: of {len(message.parts)} slices from rank "
                f"{message.peer} {len(wrong)} have another checksum than there, the first is of {name!r}"
            )

    def _where(self, version: int, step: Round) -> str:
        return f"weight push of version {version}: rank {self.plan.rank}, bucket of round {step.number}"


def _num_parts(messages: Sequence[Message]) -> int:
    return sum(len(message.parts) for message in messages)


def _span(bucket: Tensor, message: Message) -> Tensor:
    return bucket[message.offset : message.offset + message.numel]


def _sums_of(message: Message, bucket: Tensor) -> Tensor:
    return torch.stack([checksum(bucket[part.offset : part.offset + part.numel]) for part in message.parts])


def _interleaved(first: list[Parcel], second: list[Parcel]) -> list[Parcel]:
    return [parcel for pair in zip(first, second, strict=True) for parcel in pair]
