"""What the ranks have to agree on: the stages' streams, and their cut into spans and rounds.

In a round a rollout rank takes one bucket of one stage's stream. It stays at the stage for a span, some buckets that
end where a module of vLLM's is complete, and takes one of the next stage in the next rounds: so no module waits, begun,
for a stage's next turn. Replicas start with different stages, equally many with each; where there are more stages than
replicas, parts of a replica's ranks may (RolloutLayout.group). All give at all times, or as many as keep the takers
busy. The i-th span takes as many rounds as the longest i-th span of a stage has buckets, times the number of stages.
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
from megatron_riskpo.resharding.stream import (
    Stream,
    cut_into_spans,
    cut_large,
    interleaved_experts,
    module_ends,
    stage_stream,
)


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


@dataclass(frozen=True)
class Schedule:
    """Of all stages."""

    streams: tuple[Stream, ...]
    turns: tuple[np.ndarray, ...]
    """`Stream.turns` of each."""
    spans: tuple[np.ndarray, ...]
    """Of each entry of a stream: its span, and its bucket within the span."""
    chunks: tuple[np.ndarray, ...]
    span_sizes: np.ndarray
    """int64 [spans]: buckets of a span, of the stage with most; all ranks are at their stage for as many rounds."""

    @property
    def num_rounds(self) -> int:
        """Of the whole push; a rank has nothing to do in some of them."""
        return len(self.streams) * int(self.span_sizes.sum())

    def round_number(self, stage: int, first_stage: np.ndarray, entry: np.ndarray) -> np.ndarray:
        """The round in which rollout ranks that begin with `first_stage` take an entry of `stage`."""
        span, num_stages = self.spans[stage][entry], len(self.streams)
        before = np.cumsum(self.span_sizes) - self.span_sizes
        turn = (stage - first_stage) % num_stages
        return num_stages * before[span] + turn * self.span_sizes[span] + self.chunks[stage][entry]


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
    streams, spans, chunks = [], [], []
    received, once = _received(layout), _sent_once(layout)
    for stage in range(layout.actor.pp):
        sent = _num_served(layout, stage) * once
        order = interleaved_experts(layout.model.shape.num_experts, _owners(layout))
        whole = stage_stream(layout.model, layout.actor, stage, order)
        most = np.maximum(received.max(axis=0), sent)[whole.piece]
        stream = cut_large(whole, most * layout.item_size * whole.high, layout.limit, whole.high)
        columns = (stream.high - stream.low) * layout.item_size
        loads = np.concatenate([_receive_loads(layout, stream, received), _send_loads(layout, stream, sent)]) * columns
        span, chunk = cut_into_spans(loads, layout.limit, module_ends(layout.model, stream))
        streams.append(stream)
        spans.append(span)
        chunks.append(chunk)
    sizes = np.zeros(max(int(span.max(initial=0)) for span in spans) + 1, np.int64)
    for span, chunk in zip(spans, chunks, strict=True):
        np.maximum.at(sizes, span, chunk + 1)
    turns = tuple(stream.turns() for stream in streams)
    return Schedule(tuple(streams), turns, tuple(spans), tuple(chunks), sizes)


def _owners(layout: BridgeLayout) -> list[int]:
    return [layout.actor.ep, layout.rollout.tp if layout.rollout.expert_parallel else 1]


def _received(layout: BridgeLayout) -> np.ndarray:
    """int64 [tp, pieces]: indices of the cut dimension that a rank takes."""
    intervals = [target_intervals(layout, tp_rank) for tp_rank in range(layout.rollout.tp)]
    return np.stack([interval.stop - interval.start for interval in intervals])


def _num_served(layout: BridgeLayout, stage: int) -> np.ndarray:
    """int64 [pieces]: engines that the busiest owner of a tensor serves in a round, at most."""
    steps = owner_steps(layout.model, layout.actor).tolist()
    served = {step: busiest_source(step, stage, layout.actor, layout.rollout, layout.node_size) for step in set(steps)}
    return np.array([served[step] for step in steps])


def _sent_once(layout: BridgeLayout) -> np.ndarray:
    """int64 [pieces]: indices that an owner of a tensor sends at most to those of an engine's ranks that are at its
    stage."""
    model, actor, rollout = layout.model, layout.actor, layout.rollout
    intervals = [target_intervals(layout, tp_rank) for tp_rank in range(rollout.tp)]
    start, stop = (np.stack(ends) for ends in zip(*((of.start, of.stop) for of in intervals), strict=True))
    group = rollout.group(actor, 0, np.arange(rollout.tp))
    held = np.array([source_width(piece, model.shape, actor) for piece in model.pieces])
    is_whole = np.array([piece.is_expert and rollout.expert_parallel for piece in model.pieces])
    most = np.zeros(len(model.pieces), np.int64)
    for shard in range(max(piece.num_shards(actor) for piece in model.pieces)):
        taken = np.minimum(stop, (shard + 1) * held) - np.maximum(start, shard * held)
        for of_group in (np.maximum(taken[group == number], 0) for number in range(group.max() + 1)):
            # An expert that is not split has one taker.
            most = np.maximum(most, np.where(is_whole, of_group.max(axis=0), of_group.sum(axis=0)))
    return most


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
