"""What the ranks have to agree on: the stages' streams, and their cut into rounds.

In a round a replica takes one bucket of one stage's stream, and in the next round one of the next stage's. Replica r
starts with stage r % pp. Where there are fewer replicas than stages, a replica takes parts of a bucket from several
stages at once, and replica r starts at stage r times their number: all stages give at all times. After (stages / stages
at once) * (buckets of the longest stream) rounds everyone has everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_riskpo.config import ActorConfig
from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout
from megatron_riskpo.resharding.pieces import Model, source_width, target_interval
from megatron_riskpo.resharding.sources import busiest_source, owner_steps
from megatron_riskpo.resharding.stream import Stream, chunk_numbers, cut_large, interleaved_experts, stage_stream


@dataclass(frozen=True)
class BridgeLayout:
    """All that a plan depends on."""

    model: Model
    actor: ActorLayout
    rollout: RolloutLayout
    item_size: int
    """Bytes of a number."""
    bucket_bytes: int
    """Of what a rank sends and receives in a round, together."""
    node_size: int = 8
    """Ranks of a node."""

    @classmethod
    def colocated(
        cls, hf_config: Mapping[str, Any], actor: ActorConfig, world_size: int, tp: int, item_size: int,
        bucket_mib: float, node_size: int, *, expert_parallel: bool = False,
    ) -> "BridgeLayout":  # fmt: skip
        """Engines of `tp` ranks each in the training processes. Raises UsageError for a layout that cannot be."""
        rollout = RolloutLayout(tp, world_size // tp, expert_parallel)
        return cls(
            Model.of(hf_config), ActorLayout.of(actor, world_size), rollout, item_size, int(bucket_mib * 2**20),
            node_size,
        )  # fmt: skip

    @classmethod
    def served(
        cls, hf_config: Mapping[str, Any], actor: ActorLayout, tp: int, servers: int, item_size: int,
        bucket_mib: float, node_size: int, *, expert_parallel: bool = False,
    ) -> "BridgeLayout":  # fmt: skip
        """Servers of `tp` workers each, which are numbered after the actor's ranks. Raises UsageError as above."""
        rollout = RolloutLayout(tp, servers, expert_parallel, first_rank=actor.world_size)
        return cls(Model.of(hf_config), actor, rollout, item_size, int(bucket_mib * 2**20), node_size)

    @property
    def limit(self) -> int:
        """Bytes that a rank may send, and as many that it may receive, in a round."""
        both = self.rollout.first_rank < self.actor.world_size
        return self.bucket_bytes // 2 if both else self.bucket_bytes

    @property
    def stages_at_once(self) -> int:
        """From which a replica takes in a round."""
        return max(1, self.actor.pp // self.rollout.replicas)

    @property
    def num_turns(self) -> int:
        """Rounds after which a replica is back at a stage."""
        return -(-self.actor.pp // self.stages_at_once)


@dataclass(frozen=True)
class Schedule:
    """Of all stages."""

    streams: tuple[Stream, ...]
    turns: tuple[np.ndarray, ...]
    """`Stream.turns` of each."""
    chunks: tuple[np.ndarray, ...]
    """Of each entry of a stream: its bucket, counted within the stage."""
    num_chunks: int
    """Of the stage with most."""


@dataclass(frozen=True)
class Intervals:
    """[start, stop) along the cut dimension that a vLLM rank holds, an entry a piece; and its experts."""

    start: np.ndarray
    stop: np.ndarray
    experts: tuple[int, int]

    def holds(self, expert: np.ndarray) -> np.ndarray:
        """Whether the rank has any of it; -1 is what is not an expert's."""
        return (expert < 0) | ((expert >= self.experts[0]) & (expert < self.experts[1]))


def target_intervals(layout: BridgeLayout, tp_rank: int) -> Intervals:
    """What one vLLM rank holds."""
    model, rollout = layout.model, layout.rollout
    ends = [
        target_interval(piece, model.shape, rollout.tp, tp_rank, whole_experts=rollout.expert_parallel)
        for piece in model.pieces
    ]
    start, stop = np.array(ends, dtype=np.int64).T
    return Intervals(start, stop, target_experts(layout, tp_rank))


def target_experts(layout: BridgeLayout, tp_rank: int) -> tuple[int, int]:
    """[first, end) of the experts on a vLLM rank; the first ranks have one more where they do not divide."""
    num_experts, tp = layout.model.shape.num_experts, layout.rollout.tp
    if not layout.rollout.expert_parallel:
        return 0, num_experts
    base, rest = divmod(num_experts, tp)
    first = tp_rank * base + min(tp_rank, rest)
    return first, first + base + (tp_rank < rest)


@lru_cache(maxsize=8)
def make_schedule(layout: BridgeLayout) -> Schedule:
    """The same on every rank. Raises UsageError where a bucket is too small or sizes do not divide."""
    streams, chunks = [], []
    received, limit = _received(layout), layout.limit // layout.stages_at_once
    for stage in range(layout.actor.pp):
        sent = _sent(layout, stage, received)
        order = interleaved_experts(layout.model.shape.num_experts, _owners(layout))
        whole = stage_stream(layout.model, layout.actor, stage, order)
        most = np.maximum(received.max(axis=0), sent)[whole.piece]
        stream = cut_large(whole, most * layout.item_size * whole.high, limit, whole.high)
        columns = (stream.high - stream.low) * layout.item_size
        loads = np.concatenate([_receive_loads(layout, stream, received), _send_loads(layout, stream, sent)]) * columns
        streams.append(stream)
        chunks.append(chunk_numbers(loads, limit))
    turns = tuple(stream.turns() for stream in streams)
    return Schedule(tuple(streams), turns, tuple(chunks), max(int(chunk.max(initial=0)) for chunk in chunks) + 1)


def _owners(layout: BridgeLayout) -> list[int]:
    return [layout.actor.ep, layout.rollout.tp if layout.rollout.expert_parallel else 1]


def _received(layout: BridgeLayout) -> np.ndarray:
    """int64 [tp, pieces]: indices of the cut dimension that a rank takes."""
    intervals = [target_intervals(layout, tp_rank) for tp_rank in range(layout.rollout.tp)]
    return np.stack([interval.stop - interval.start for interval in intervals])


def _sent(layout: BridgeLayout, stage: int, received: np.ndarray) -> np.ndarray:
    """int64 [pieces]: indices that the busiest owner sends in a round, at most."""
    model, actor, rollout = layout.model, layout.actor, layout.rollout
    steps = owner_steps(model, actor)
    serves = {
        step: busiest_source(step, stage, actor, rollout, layout.node_size) for step in {int(step) for step in steps}
    }
    copies = np.maximum(1, received.sum(axis=0) // np.array([piece.length for piece in model.pieces]))
    if rollout.expert_parallel:
        copies[[piece.is_expert for piece in model.pieces]] = 1
    held = np.array([source_width(piece, model.shape, actor) for piece in model.pieces])
    return np.array([serves[int(step)] for step in steps]) * copies * held


def _receive_loads(layout: BridgeLayout, stream: Stream, received: np.ndarray) -> np.ndarray:
    """int64 [ranks, entries]: a row a rank that may be the one to fill its bucket first."""
    if not layout.rollout.expert_parallel:
        return received.max(axis=0)[stream.piece][None]
    rows = []
    for tp_rank in range(layout.rollout.tp):
        first, end = target_experts(layout, tp_rank)
        is_held = (stream.expert < 0) | ((stream.expert >= first) & (stream.expert < end))
        rows.append(received[tp_rank][stream.piece] * is_held)
    return np.stack(rows)


def _send_loads(layout: BridgeLayout, stream: Stream, sent: np.ndarray) -> np.ndarray:
    owner = layout.actor.expert_owner(stream.expert, layout.model.shape.num_experts)
    return np.stack([sent[stream.piece] * ((owner < 0) | (owner == rank)) for rank in range(layout.actor.ep)])
