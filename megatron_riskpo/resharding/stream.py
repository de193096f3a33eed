"""The order in which a pipeline stage gives its weights away, and where it is cut into buckets.

Everything is an array over the stage's tensors: a model of 256 experts a layer has 46,000 of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_riskpo.errors import UsageError
from megatron_riskpo.resharding.layouts import ActorLayout
from megatron_riskpo.resharding.pieces import Model, module_numbers

SPAN_BUCKETS = 8
"""Buckets of a span, at most where modules are smaller: enough that its last one, which may be nearly empty, counts
little, and few enough that a rank does not wait long for one that is at a longer span."""


@dataclass(frozen=True)
class Stream:
    """Tensors of one pipeline stage, in order; arrays of one entry a tensor, or a part of one."""

    piece: np.ndarray
    """Which of the model's pieces."""
    layer: np.ndarray
    """-1 outside of the layers; so are experts of what is not an expert's."""
    expert: np.ndarray
    low: np.ndarray
    """[low, high) of the dimension that is not cut: parts of a tensor larger than a bucket."""
    high: np.ndarray

    def __len__(self) -> int:
        return len(self.piece)

    def turns(self) -> np.ndarray:
        """int64 [entries]: numbers by which owners take turns, piece by piece, so that each has equally many of the
        large tensors."""
        turns = np.empty(len(self), np.int64)
        turns[np.argsort(self.piece, kind="stable")] = np.arange(len(self))
        return turns

    def take(self, index: np.ndarray) -> "Stream":
        """The entries of the given numbers."""
        return Stream(*(array[index] for array in vars(self).values()))


def stage_stream(model: Model, layout: ActorLayout, stage: int, expert_order: np.ndarray) -> Stream:
    """All tensors of a stage, none cut. A tied embedding is on the last stage too, where the output layer needs it."""
    pattern = _layer_pattern(model, expert_order)
    layers = layout.stage_layers(stage, model.shape.num_layers)
    rows = np.tile(pattern, (len(layers), 1))
    layer = np.repeat(layers, len(pattern))
    outer = [i for i, piece in enumerate(model.pieces) if not piece.is_layer]
    before = outer[:1] if stage == 0 else []
    after = outer[1:] if stage == layout.pp - 1 else []
    if stage == layout.pp - 1 and layout.pp > 1 and model.shape.tied_embeddings:
        after = [*after, outer[0]]
    ends = [np.array([[i, -1] for i in ids], dtype=np.int64).reshape(-1, 2) for ids in (before, after)]
    piece, expert = np.concatenate([ends[0], rows, ends[1]]).T
    outside = [np.full(len(ids), -1) for ids in (before, after)]
    widths = np.array([p.width for p in model.pieces])[piece]
    return Stream(piece, np.concatenate([outside[0], layer, outside[1]]), expert, np.zeros_like(piece), widths)


def _layer_pattern(model: Model, expert_order: np.ndarray) -> np.ndarray:
    """int64 [tensors of a layer, 2]: piece, expert; those of one module of vLLM's one after the other."""
    parts = []
    for i in np.argsort(module_numbers(model), kind="stable").tolist():
        if model.pieces[i].is_layer:
            experts = expert_order if model.pieces[i].is_expert else np.array([-1])
            parts.append(np.stack([np.full(len(experts), i), experts], axis=1))
    return np.concatenate(parts).astype(np.int64)


def module_ends(model: Model, stream: Stream) -> np.ndarray:
    """bool [entries]: whether it is the last one of a module of vLLM's."""
    module = module_numbers(model)[stream.piece]
    goes_on = (module[1:] == module[:-1]) & (stream.layer[1:] == stream.layer[:-1])
    return np.append(~goes_on, [True] * bool(len(stream)))


def interleaved_experts(num_experts: int, owners: Sequence[int]) -> np.ndarray:
    """The experts in an order in which neighbours belong to different ranks, so that all are busy at once; `owners` are
    the numbers of ranks that the experts are dealt out to in blocks, on the one side and on the other."""
    experts = np.arange(num_experts)
    blocks = sorted(-(-num_experts // count) for count in owners) if num_experts else [1]
    return experts[np.lexsort((experts, *(experts % block for block in reversed(blocks))))]


def cut_large(stream: Stream, load: np.ndarray, limit: int, widths: np.ndarray) -> Stream:
    """Tensors whose load on some rank is more than `limit` bytes as several entries, cut across.

    load [tensors]: bytes of the whole tensor on the rank that has most of it.
    """
    unit = -(-load // widths)  # bytes of one index of the dimension that is not cut
    if len(unit) and unit.max() > limit:
        raise UsageError(
            f"bridge.bucket_mib is too small for this model: its pieces cannot be cut below {int(unit.max())} bytes, "
            f"and a bucket has room for {limit}; raise it"
        )
    step = np.maximum(1, limit // np.maximum(unit, 1))
    num_parts = -(-widths // step)
    index = np.repeat(np.arange(len(stream)), num_parts)
    part = np.arange(len(index)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    cut = stream.take(index)
    low = part * step[index]
    return Stream(cut.piece, cut.layer, cut.expert, low, np.minimum(low + step[index], widths[index]))


def cut_into_spans(loads: np.ndarray, limit: int, is_end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [entries] twice: the span that each entry is in, and its bucket within the span.

    In no row of `loads` (int64 [ranks, entries], bytes) the entries of a bucket are more than `limit`. A span ends
    where `is_end` (bool [entries]).
    """
    totals = np.concatenate([np.zeros((len(loads), 1), np.int64), np.cumsum(loads, axis=1)], axis=1)
    spans, chunks = np.zeros((2, loads.shape[1]), np.int64)
    start = number = 0
    while start < len(spans):
        ends = _span(totals, start, limit, is_end)
        for chunk, (first, stop) in enumerate(pairwise([start, *ends])):
            chunks[first:stop] = chunk
        spans[start : ends[-1]] = number
        start, number = ends[-1], number + 1
    return spans, chunks


def _span(totals: np.ndarray, start: int, limit: int, is_end: np.ndarray) -> list[int]:
    """Where the buckets of the span that begins at `start` end."""
    ends: list[int] = []
    while True:
        ends.append(_chunk_end(totals, ends[-1] if ends else start, limit))
        if len(ends) < SPAN_BUCKETS and ends[-1] < len(is_end):
            continue
        possible = np.flatnonzero(is_end[start : ends[-1]])
        if len(possible):
            stop = start + int(possible[-1]) + 1
            return [*(end for end in ends if end < stop), stop]


def _chunk_end(totals: np.ndarray, start: int, limit: int) -> int:
    """Looked for in growing windows: with many ranks a look at the whole stream would cost more than the rest."""
    window = 64
    while True:
        ahead = totals[:, start : start + window + 1]
        beyond = (ahead[:, -1] - ahead[:, 0]).max() > limit
        if beyond or start + window + 1 >= totals.shape[1]:
            fits = ((ahead - ahead[:, :1]) <= limit).all(axis=0)
            return start + max(1, int(fits.sum()) - 1)
        window *= 4
