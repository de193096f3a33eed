"""Sinks filled straight from the parameters of all ranks of random layouts; compared with whole tensors cut by hand.

Not tested here: other processes' memory (test_peer_parameters, test_faults, test_in_process).
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.memory_sink import MemorySink
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.pull import WeightPull
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.slices import SourceSlice
from tests.resharding.fault_ranks import fault_layout
from tests.resharding.layout_strategies import bridge_layouts
from tests.resharding.whole_model import actor_parameters, module_bytes, rollout_parameters


def pull_of(layout: BridgeLayout, rank: int, *, with_checksums: bool) -> tuple[WeightPull, MemorySink]:
    peers = {peer: actor_parameters(layout, peer) for peer in range(layout.actor.world_size)}
    place = layout.rollout.place(rank)
    assert place is not None
    sink = MemorySink(layout, place[1], torch.empty(0, dtype=torch.int64))
    return WeightPull(plan_rank(layout, rank), peers, with_checksums=with_checksums), sink


@given(bridge_layouts(max_ranks=12), st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_all_sinks_end_with_their_shards(layout, with_checksums):
    for index in range(layout.rollout.num_ranks):
        rank = layout.rollout.first_rank + index
        pull, sink = pull_of(layout, rank, with_checksums=with_checksums)
        report = pull.run(sink, version=0)
        expected = rollout_parameters(layout, index % layout.rollout.tp)
        for name, tensor in sink.parameters.items():
            assert torch.equal(tensor, expected[name][: len(tensor)]), (rank, name)
        assert not any(sink.missing.values())
        assert report.bytes_received + report.bytes_local == sum(8 * int((t > 0).sum()) for t in expected.values())
        assert report.peak_extra_bytes == 0
        assert report.peak_open_bytes == max(module_bytes(sink.parameters).values())


def test_a_slice_that_is_copied_wrongly_is_found_by_its_checksum(monkeypatch):
    pull, sink = pull_of(fault_layout(), 0, with_checksums=True)
    right, calls = SourceSlice.copy, []

    def copy(self: SourceSlice, parameter: torch.Tensor, message: torch.Tensor) -> None:
        right(self, parameter, message)
        calls.append(self)
        if len(calls) == 9:
            message[-1, -1] ^= 1

    monkeypatch.setattr(SourceSlice, "copy", copy)
    with pytest.raises(RunError, match=r"version 3: rank 0, round \d+ is corrupted: of 1 slices from rank \d 1 have"):
        pull.run(sink, version=3)
