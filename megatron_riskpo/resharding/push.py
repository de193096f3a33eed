"""One rank's side of a push: buckets filled, sent, received and emptied into the sink, two of them at a time.

While a bucket is on the wires the next one is filled. The extra memory is the two buckets, whatever the model's size;
it is counted, and more is an error.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.checksums import checksum
from megatron_riskpo.resharding.plan import RankPlan
from megatron_riskpo.resharding.rounds import Message, Part, Round, bucket_sizes, make_rounds
from megatron_riskpo.resharding.transports.base import Parcel, PeerError, PendingRound, Transport, reason_of
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
class _Flight:
    """A round under way."""

    round: Round
    bucket: Tensor
    pending: PendingRound
    sums: list[Tensor]
    """With checksums, of each message received the sender's, one a slice (8 bytes; not counted as extra memory)."""
    sent: list[Parcel]
    """Kept until they have left."""


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
        buckets = self._allocate()
        peak = sum(bucket.nbytes for bucket in buckets)
        limit = 2 * self.plan.layout.bucket_bytes
        if peak > limit:
            raise RunError(f"weight push: the buckets of rank {self.plan.rank} take {peak} bytes, more than {limit}")
        flight: _Flight | None = None
        for index, step in enumerate(self.rounds):
            started = self._start(step, buckets[index % 2], sink, version)
            if flight is not None:
                self._finish(flight, sink, version)
            flight = started
        if flight is not None:
            self._finish(flight, sink, version)
        plan = self.plan
        moved = plan.num_bytes(plan.remote)
        return PushReport(time.perf_counter() - start, moved, plan.num_bytes(plan.receives) - moved, peak)

    def _allocate(self) -> list[Tensor]:
        """Two buckets. On a GPU they are freed after the push: its memory is the engine's."""
        example = next(iter(self._parameters.values())).detach()
        return self._transport.buckets(bucket_sizes(self.rounds), example)

    def _start(self, step: Round, bucket: Tensor, sink: ShardSink, version: int) -> _Flight:
        sends, receives = [], []
        sums = [bucket.new_empty(len(m.parts) * self._with_checksums, dtype=torch.int64) for m in step.receives]
        for message in step.sends:
            self._fill(message, bucket)
            sends.append(Parcel(message.peer, _span(bucket, message)))
            if self._with_checksums:
                sends.append(Parcel(message.peer, _sums_of(message, bucket)))
        for message, expected in zip(step.receives, sums, strict=True):
            receives.append(Parcel(message.peer, _span(bucket, message)))
            if self._with_checksums:
                receives.append(Parcel(message.peer, expected))
        try:
            pending = self._transport.start(sends, receives)
        except RuntimeError as error:
            raise RunError(f"{self._where(version, step)} could not be sent: {reason_of(error)}") from error
        self._copy_local(step, sink)
        return _Flight(step, bucket, pending, sums * self._with_checksums, sends)

    def _copy_local(self, step: Round, sink: ShardSink) -> None:
        for part in step.local:
            storage = sink.parameter(part.target.parameter)
            copy_within_rank(part.source, self._parameters[part.source.parameter], part.target, storage)
            sink.arrived(part.target.parameter, part.numel)

    def _fill(self, message: Message, bucket: Tensor) -> None:
        for part in message.parts:
            for place, piece in part.source.copies(self._parameters[part.source.parameter], _piece(bucket, part)):
                place.copy_(piece)

    def _finish(self, flight: _Flight, sink: ShardSink, version: int) -> None:
        try:
            flight.pending.wait(time.monotonic() + self._timeout_s)
        except PeerError as error:
            raise RunError(
                f"{self._where(version, flight.round)} did not go through within {self._timeout_s:g} s, {error}; rank "
                f"{error.peer} is dead, stopped or unreachable (bridge.timeout_s is how long to wait)"
            ) from error
        for message, expected in zip(flight.round.receives, flight.sums, strict=False):
            self._compare(message, expected, flight, version)
        for message in flight.round.receives:
            for part in message.parts:
                part.target.view(sink.parameter(part.target.parameter)).copy_(_piece(flight.bucket, part))
                sink.arrived(part.target.parameter, part.numel)

    def _compare(self, message: Message, expected: Tensor, flight: _Flight, version: int) -> None:
        wrong = (_sums_of(message, flight.bucket) != expected).nonzero()[:, 0].tolist()
        if wrong:
            name = message.parts[wrong[0]].target.parameter
            raise RunError(
                f"{self._where(version, flight.round)} is corrupted: of {len(message.parts)} slices from rank "
                f"{message.peer} {len(wrong)} have another checksum than there, the first is of {name!r}"
            )

    def _where(self, version: int, step: Round) -> str:
        return f"weight push of version {version}: rank {self.plan.rank}, bucket of round {step.number}"


def _span(bucket: Tensor, message: Message) -> Tensor:
    return bucket[message.offset : message.offset + message.numel]


def _piece(bucket: Tensor, part: Part) -> Tensor:
    return bucket[part.offset : part.offset + part.numel].view(part.source.shape)


def _sums_of(message: Message, bucket: Tensor) -> Tensor:
    return torch.stack([checksum(bucket[part.offset : part.offset + part.numel]) for part in message.parts])
