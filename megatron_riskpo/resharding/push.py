"""One rank's side of a push: buckets filled, sent, received and emptied into the sink, two of them at a time.

While a bucket is on the wires the next one is filled, and the one before is emptied. The extra memory is the two
buckets and one module of vLLM's that is not packed yet, whatever the model's size; both are counted, and more is an
error.
"""

import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.plan import RankPlan
from megatron_riskpo.resharding.rounds import Arrival, Message, Part, Round, bucket_sizes, make_rounds
from megatron_riskpo.resharding.sink import ShardSink, compare, copy_slices, sums_of
from megatron_riskpo.resharding.transports.base import Parcel, PeerError, PendingRound, Transport


@dataclass(frozen=True)
class PushReport:
    """What a push did on this rank."""

    seconds: float
    bytes_received: int
    """From other ranks."""
    bytes_local: int
    """From this rank itself."""
    peak_extra_bytes: int
    """Of the two buckets."""
    peak_open_bytes: int
    """Of the largest module of vLLM's while its slices came: it is packed when it has all of them."""


@dataclass
class _Flight:
    """A round under way."""

    round: Round
    pending: PendingRound
    sent: list[Parcel]
    """Kept until they have left."""
    received: list[Parcel]


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
        flights: deque[_Flight] = deque()  # two at most: the last one's messages have not been received yet
        for index, step in enumerate(self.rounds):
            if len(flights) == 2:
                self._drain(flights.popleft(), version)
            flights.append(self._start(step, buckets[index % 2], version))
            if len(flights) == 2:
                self._receive(flights[0], sink, version)
        if flights:
            self._receive(flights[-1], sink, version)
        for flight in flights:
            self._drain(flight, version)
        plan = self.plan
        moved = plan.num_bytes(plan.remote)
        local = plan.num_bytes(plan.receives) - moved
        return PushReport(time.perf_counter() - start, moved, local, peak, sink.open_modules.peak_bytes)

    def _allocate(self) -> list[Tensor]:
        """Two buckets. On a GPU they are freed after the push: its memory is the engine's."""
        example = next(iter(self._parameters.values())).detach()
        return [example.new_empty(size) for size in bucket_sizes(self.rounds)]

    def _start(self, step: Round, bucket: Tensor, version: int) -> _Flight:
        contents = [_span(bucket, message) for message in step.sends]
        for message, content in zip(step.sends, contents, strict=True):
            self._fill(message, content)
        sends = [Parcel(message.peer, content) for message, content in zip(step.sends, contents, strict=True)]
        receives = [Parcel(message.peer, _span(bucket, message)) for message in step.receives]
        if self._with_checksums:  # 8 bytes a slice; not counted as extra memory
            sends += [Parcel(message.peer, sums_of(message.parts, self._parameters)) for message in step.sends]
            for message in step.receives:
                receives.append(Parcel(message.peer, bucket.new_empty(len(message.parts), dtype=torch.int64)))
        with self._waiting(step, version):
            pending = self._transport.start(sends, receives)
        return _Flight(step, pending, sends, receives)

    def _fill(self, message: Message, content: Tensor) -> None:
        for part in message.parts:
            part.source.copy(self._parameters[part.source.parameter], _piece(content, message, part))

    def _receive(self, flight: _Flight, sink: ShardSink, version: int) -> None:
        step = flight.round
        with self._waiting(step, version) as deadline:
            flight.pending.receive(deadline)
        messages = {message.peer: message for message in step.receives}
        contents = [parcel.buffer for parcel in flight.received]
        buffers = dict(zip(messages, contents, strict=False))
        sums = dict(zip(messages, contents[len(messages) :], strict=False))  # none without checksums
        where = self._where(version, step)
        for arrival in step.arrivals:
            peer = arrival.peer
            if peer == self.plan.rank:
                copy_slices(arrival.parts, self._parameters, sink, peer, where if self._with_checksums else "")
            else:
                self._empty(arrival, messages[peer], buffers[peer], sums.get(peer), sink, where)
            sink.open_modules.check()

    def _empty(
        self, arrival: Arrival, message: Message, content: Tensor, sums: Tensor | None, sink: ShardSink, where: str
    ) -> None:
        """Part of a message into the sink; RunError where its sums differ."""
        for part in arrival.parts:
            part.target.view(sink.parameter(part.target.parameter)).copy_(_piece(content, message, part))
        if sums is not None:
            of_parts = sums[arrival.first : arrival.first + len(arrival.parts)]
            compare(arrival.parts, of_parts, sink, arrival.peer, where)
        for part in arrival.parts:
            sink.arrived(part.target.parameter, part.numel)

    def _drain(self, flight: _Flight, version: int) -> None:
        with self._waiting(flight.round, version) as deadline:
            flight.pending.drain(deadline)

    @contextmanager
    def _waiting(self, step: Round, version: int) -> Generator[float]:
        """Gives the deadline for a wait."""
        try:
            yield time.monotonic() + self._timeout_s
        except PeerError as error:
            raise RunError(
                f"{self._where(version, step)} did not go through within {self._timeout_s:g} s, {error}; rank "
                f"{error.peer} is dead, stopped or unreachable (bridge.timeout_s is how long to wait)"
            ) from error

    def _where(self, version: int, step: Round) -> str:
        return f"weight push of version {version}: rank {self.plan.rank}, bucket of round {step.number}"


def _span(bucket: Tensor, message: Message) -> Tensor:
    return bucket[message.offset : message.offset + message.numel]


def _piece(content: Tensor, message: Message, part: Part) -> Tensor:
    """Of a message's numbers those of one part, in its shape."""
    return content[part.offset - message.offset :][: part.numel].view(part.source.shape)
