"""The plan's idea of where each Hugging Face tensor lies on a vLLM rank, tensor by tensor."""

from collections.abc import Iterator

import numpy as np
from torch import nn

from megatron_riskpo.resharding.layout_check import Box, Placement, compare, traced_placements
from megatron_riskpo.resharding.pieces import Piece, target_name
from megatron_riskpo.resharding.plan import TRANSFER
from megatron_riskpo.resharding.schedule import BridgeLayout, target_intervals
from megatron_riskpo.resharding.slices import target_slice


def hf_tensors(layout: BridgeLayout) -> Iterator[tuple[str, tuple[int, ...], Piece, int, int]]:
    """(name, shape, piece, layer, expert) of every Hugging Face tensor; -1 where it has no layer or expert."""
    shape = layout.model.shape
    for piece in layout.model.pieces:
        for layer in range(shape.num_layers) if piece.is_layer else [-1]:
            for expert in range(shape.num_experts) if piece.is_expert else [-1]:
                name = piece.rule.hf[piece.index].format(layer=layer, expert=expert)
                yield name, piece.shape, piece, layer, expert


def planned_placements(layout: BridgeLayout, tp_rank: int) -> dict[str, list[Placement]]:
    """By Hugging Face name, as `traced_placements` says it; nothing for an expert of another rank."""
    intervals = target_intervals(layout, tp_rank)
    found: dict[str, list[Placement]] = {}
    for name, shape, piece, layer, expert in hf_tensors(layout):
        index = layout.model.pieces.index(piece)
        start, stop = int(intervals.start[index]), int(intervals.stop[index])
        is_held = bool(intervals.holds(np.array(expert)))
        is_held &= stop > start
        found[name] = [_placement(layout, tp_rank, shape, index, layer, expert, start, stop)] if is_held else []
    return found


def _placement(
    layout: BridgeLayout, tp_rank: int, shape: tuple[int, ...], index: int, layer: int, expert: int, start: int,
    stop: int,
) -> Placement:  # fmt: skip
    piece = layout.model.pieces[index]
    transfer = np.zeros((), TRANSFER)
    values = {"piece": index, "layer": layer, "expert": expert, "start": start, "stop": stop, "high": piece.width}
    for field, value in values.items():
        transfer[field] = value
    target = target_slice(layout, tp_rank, transfer[()])
    stack = ((target.expert, target.expert + 1),) if target.expert >= 0 else ()
    source = _box(piece.dim, (start, stop), (0, piece.width), len(shape))
    place = _box(piece.dim, (target.start, target.stop), (0, piece.width), len(shape))
    return Placement(source, target.parameter, (*stack, *place))


def _box(dim: int, cut: tuple[int, int], other: tuple[int, int], ndim: int) -> Box:
    if ndim == 1:
        return (cut,)
    return (other, cut) if dim else (cut, other)


def expected_numbers(layout: BridgeLayout, tp_rank: int) -> dict[str, int]:
    """By vLLM's parameter name, how many numbers a push brings; 0 for rows of the vocabulary that only pad."""
    counts = {target_name(piece, layer): 0 for _, _, piece, layer, _ in hf_tensors(layout)}
    for placements in planned_placements(layout, tp_rank).values():
        for place in placements:
            size = int(np.prod([stop - start for start, stop in place.target]))
            counts[place.parameter] = counts.get(place.parameter, 0) + size
    return counts


def checked_placements(model: nn.Module, layout: BridgeLayout, tp_rank: int) -> dict[str, list[Placement]]:
    """Where the loaders of a vLLM `model`, inside a layerwise reload, put each tensor; RunError where it is not where
    the plan says."""
    traced = traced_placements(model, [(name, shape) for name, shape, *_ in hf_tensors(layout)])
    compare(planned_placements(layout, tp_rank), traced)
    return traced
