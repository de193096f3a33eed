"""The host's time for a rank's slices: the model of a case with next to no numbers in it is pushed over no wires.

What is left of a push is what Python and torch take to find and copy each slice. Neither a GPU's launch of a kernel is
in it, nor vLLM's own sink.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from reshard_cases import Case
from torch import Tensor

from megatron_riskpo.resharding.memory_sink import MemorySink
from megatron_riskpo.resharding.pieces import source_place, source_width
from megatron_riskpo.resharding.plan import RankPlan, plan_rank
from megatron_riskpo.resharding.push import WeightPush
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.slices import source_slice
from megatron_riskpo.resharding.transports.base import Parcel

_HEAD_DIM = 2
_WIDTH = 64
"""Of what is cut over ranks: the feed-forward layers, and an expert."""


class NoWires:
    """A transport on which everything has arrived."""

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> "NoWires":
        return self

    def receive(self, deadline: float) -> None:
        pass

    def drain(self, deadline: float) -> None:
        pass


def tiny(case: Case) -> Case:
    """As many layers, heads and experts on the same ranks, so about as many slices: none is cut."""
    config = dict(case.hf_config)
    config |= {"hidden_size": config["num_attention_heads"] * _HEAD_DIM, "vocab_size": 1024}
    for name, value in (("intermediate_size", _WIDTH), ("moe_intermediate_size", _WIDTH), ("head_dim", _HEAD_DIM)):
        if name in config:
            config[name] = value
    return replace(case, hf_config=config)


def push_of(layout: BridgeLayout, rank: int) -> tuple[WeightPush, MemorySink]:
    """Of a rank of actor and engine, on parameters of its own making."""
    place = layout.rollout.place(rank)
    assert place is not None, f"rank {rank} has no engine"
    plan, example = plan_rank(layout, rank), torch.zeros(0, dtype=torch.bfloat16)
    push = WeightPush(plan, _parameters(plan, example), NoWires(), timeout_s=60)
    return push, MemorySink(layout, place[1], example)


def _parameters(plan: RankPlan, example: Tensor) -> dict[str, Tensor]:
    """Those of which the rank gives something, as large as Megatron has them."""
    layout, found = plan.layout, {}
    for transfer in (*plan.sends, *plan.receives[plan.receives["source"] == plan.rank]):
        piece = layout.model.pieces[transfer["piece"]]
        width = source_width(piece, layout.model.shape, layout.actor)
        place = source_place(piece, layout.model.shape, layout.actor)
        shape = (piece.shape[0], width) if piece.dim else (width // place.block * place.period, *piece.shape[1:])
        found[source_slice(layout, plan.rank, transfer).parameter] = example.new_zeros(shape)
    return found


def microseconds_a_slice(case: Case, repeats: int = 3) -> float:
    """Processor time of a push of rank 0 over the slices that it gives and takes; the fastest of some pushes."""
    push, sink = push_of(tiny(case).layout, 0)
    times = []
    for version in range(repeats):
        start = time.process_time()
        push.run(sink, version)
        times.append(time.process_time() - start)
    return 1e6 * min(times) / (len(push.plan.sends) + len(push.plan.receives))
