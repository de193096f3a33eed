"""Buckets filled, carried and emptied for all ranks of random layouts: ranks are threads, wires are queues.

The sinks are compared with whole tensors cut by hand. Not tested here: gloo (test_faults, test_in_process).
"""

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.memory_sink import MemorySink
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.push import PushReport, WeightPush
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.sink import ShardSink
from megatron_riskpo.resharding.slices import TargetSlice
from megatron_riskpo.resharding.transports.base import Parcel, PeerError
from megatron_riskpo.rollout.network_push import _NoSink
from tests.resharding.fault_ranks import fault_layout
from tests.resharding.layout_strategies import bridge_layouts
from tests.resharding.whole_model import actor_parameters, module_bytes, rollout_parameters

Wires = defaultdict[tuple[int, int], queue.Queue]


class QueueTransport:
    """A queue for each pair of ranks, with copies of the messages; what has left is spoilt in its bucket."""

    def __init__(self, rank: int, wires: Wires, change: Callable[[torch.Tensor], torch.Tensor] = lambda buffer: buffer):
        self.rank, self.wires, self.change = rank, wires, change
        self.in_flight = self.most_in_flight = self.launches = 0
        self.calls: list[tuple[str, int]] = []
        """With the number of the round, counted from 0."""

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> "QueueTransport.Pending":
        self.calls.append(("start", self.launches))
        self.in_flight += 1
        self.launches += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return self.Pending(self, sends, receives)

    class Pending:
        def __init__(self, transport: "QueueTransport", sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
            self.transport, self.sends, self.receives = transport, sends, receives
            self.number = transport.launches - 1
            for parcel in sends:
                transport.wires[transport.rank, parcel.peer].put(transport.change(parcel.buffer.clone()))

        def receive(self, deadline: float) -> None:
            self.transport.calls.append(("receive", self.number))
            for parcel in self.receives:
                try:
                    wire = self.transport.wires[parcel.peer, self.transport.rank]
                    parcel.buffer.copy_(wire.get(timeout=max(0.01, deadline - time.monotonic())))
                except queue.Empty:
                    raise PeerError(parcel.peer, "waiting for", "nothing came") from None

        def drain(self, deadline: float) -> None:
            self.transport.in_flight -= 1
            for parcel in self.sends:
                parcel.buffer.fill_(-1)


class Run:
    """A push of all ranks of a layout."""

    def __init__(self, layout: BridgeLayout, *, with_checksums: bool, timeout_s: float = 30) -> None:
        self.layout = layout
        wires: Wires = defaultdict(queue.Queue)
        num_ranks = max(layout.actor.world_size, layout.rollout.rank(layout.rollout.replicas, 0))
        self.transports = [QueueTransport(rank, wires) for rank in range(num_ranks)]
        self.sinks = [self._sink(rank) for rank in range(num_ranks)]
        self.pushes = [
            WeightPush(
                plan_rank(layout, rank), self._parameters(rank), transport, timeout_s=timeout_s,
                with_checksums=with_checksums,
            )
            for rank, transport in enumerate(self.transports)
        ]  # fmt: skip
        self.outcomes: list[PushReport | Exception | None] = [None] * num_ranks

    def _parameters(self, rank: int) -> dict[str, torch.Tensor]:
        is_actor = rank < self.layout.actor.world_size
        # Ranks of engines alone have none; the push takes the dtype of its buckets from what there is.
        return actor_parameters(self.layout, rank) if is_actor else {"": torch.empty(0, dtype=torch.int64)}

    def _sink(self, rank: int) -> ShardSink:
        place = self.layout.rollout.place(rank)
        return _NoSink() if place is None else MemorySink(self.layout, place[1], torch.empty(0, dtype=torch.int64))

    def _one(self, rank: int, version: int) -> None:
        try:
            self.outcomes[rank] = self.pushes[rank].run(self.sinks[rank], version)
        except Exception as error:
            self.outcomes[rank] = error

    def go(self, version: int = 0) -> None:
        threads = [threading.Thread(target=self._one, args=(rank, version)) for rank in range(len(self.pushes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@given(bridge_layouts(max_ranks=12), st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_all_sinks_end_with_their_shards(layout, with_checksums):
    run = Run(layout, with_checksums=with_checksums)
    run.go()
    for rank, (push, report, sink) in enumerate(zip(run.pushes, run.outcomes, run.sinks, strict=True)):
        assert isinstance(report, PushReport), report
        assert report.peak_extra_bytes == push.plan.bucket_bytes <= 2 * layout.bucket_bytes
        num_rounds, transport = len(push.rounds), run.transports[rank]
        assert transport.most_in_flight == min(2, num_rounds)
        assert transport.launches == num_rounds  # one a bucket, however many tensors
        # The next bucket is filled and under way before anybody waits for this one.
        pairs = [(("start", n + 1), ("receive", n)) for n in range(num_rounds - 1)]
        assert all(transport.calls.index(start) < transport.calls.index(wait) for start, wait in pairs)
        if not isinstance(sink, MemorySink):
            assert report.peak_open_bytes == 0
            continue
        assert report.peak_open_bytes == max(module_bytes(sink.parameters).values())
        expected = rollout_parameters(layout, layout.rollout.place(rank)[1])  # type: ignore[index]
        for name, tensor in sink.parameters.items():
            assert torch.equal(tensor, expected[name][: len(tensor)]), (rank, name)
        assert not any(sink.missing.values())
        assert report.bytes_received + report.bytes_local == sum(8 * int((t > 0).sum()) for t in expected.values())


@pytest.mark.parametrize("local", [False, True])
def test_a_slice_that_is_copied_wrongly_is_found_by_its_checksum(monkeypatch, local):
    """By the copy into vLLM's parameter, or by the one within a rank."""
    right = TargetSlice.view
    run = Run(fault_layout(), with_checksums=True, timeout_s=0.5)
    arrivals = [arrival for step in run.pushes[0].rounds for arrival in step.arrivals]
    arrival = next(arrival for arrival in arrivals if (arrival.peer == 0) == local)
    part = arrival.parts[0]
    calls = 0

    def view(self: TargetSlice, parameter: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        found = right(self, parameter)
        if self is not part.target:
            return found
        calls += 1
        return found.clone() if calls == 1 else found  # what is copied into a clone is lost

    monkeypatch.setattr(TargetSlice, "view", view)
    run.go()
    message = str(run.outcomes[0])
    source, name = arrival.peer, part.target.parameter
    assert f"slices from rank {source} 1 have another checksum than there, the first is of {name!r}" in message


def test_a_second_push_brings_the_new_weights():
    run = Run(fault_layout(), with_checksums=False)
    run.go()
    before = [sink.parameters["model.norm.weight"].clone() for sink in run.sinks]  # type: ignore[union-attr]
    changed = actor_parameters(run.layout, 2)["decoder.final_layernorm.weight"]
    changed += 1
    try:
        run.go(version=1)
        for sink, old in zip(run.sinks, before, strict=True):
            assert torch.equal(sink.parameters["model.norm.weight"], old + 1)  # type: ignore[union-attr]
    finally:
        changed -= 1  # the made-up parameters are shared


def test_a_changed_message_is_found_by_its_checksum_and_by_nothing_else():
    def change(buffer: torch.Tensor) -> torch.Tensor:
        buffer[-1] ^= 1  # of a payload or of a sum, either shows
        return buffer

    for with_checksums in (True, False):
        run = Run(fault_layout(), with_checksums=with_checksums, timeout_s=0.5)
        run.transports[1].change = change
        run.go(version=4)
        messages = [str(outcome) for outcome in run.outcomes if isinstance(outcome, RunError)]
        corrupted = [message for message in messages if "slices from rank 1" in message and "corrupted" in message]
        assert bool(corrupted) == with_checksums
        assert all("weight push of version 4: rank" in message for message in corrupted)


def test_who_waits_in_vain_says_for_whom():
    run = Run(fault_layout(), with_checksums=False, timeout_s=0.5)
    run.transports[1].start = lambda sends, receives: QueueTransport.Pending(run.transports[1], [], receives)  # type: ignore[method-assign]
    run.go()
    messages = [str(run.outcomes[rank]) for rank in (0, 2)]
    assert all("did not go through within 0.5 s, waiting for rank" in message for message in messages)
    # One of the two waits for the silent rank first; the other may wait for the one that has given up.
    assert any("waiting for rank 1: nothing came; rank 1 is dead, stopped or" in message for message in messages)


def test_buckets_beyond_the_bound_are_an_error():
    run = Run(fault_layout(), with_checksums=False)
    push = run.pushes[0]
    (first, *rest) = push.rounds
    too_large = replace(first, sends=(), receives=tuple(m for step in push.rounds for m in step.receives), arrivals=())
    push.rounds = [too_large, *rest]
    with pytest.raises(RunError, match=r"the buckets of rank 0 take \d+ bytes, more than 262144"):
        push.run(run.sinks[0], 0)  # type: ignore[arg-type]
