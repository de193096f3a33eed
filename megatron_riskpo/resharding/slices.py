"""Transfers as slices of real parameters: views to copy from on the actor's side, and to copy into on vLLM's.

A transfer's message is the box [start:stop, low:high] of the Hugging Face tensor (where columns are cut over ranks:
[low:high, start:stop]), contiguous. Vectors are taken as matrices of one column.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_riskpo.resharding.pieces import (
    Place,
    source_place,
    source_width,
    target_interval,
    target_name,
    target_offset,
)
from megatron_riskpo.resharding.schedule import BridgeLayout, target_experts


@dataclass(frozen=True, slots=True)
class SourceSlice:
    """What a transfer takes from a Megatron parameter of the sending rank."""

    parameter: str
    """By its name in the family's table."""
    place: Place
    dim: int
    start: int
    """[start, stop) within the rank's interval."""
    stop: int
    low: int
    high: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the message."""
        size, width = self.stop - self.start, self.high - self.low
        return (width, size) if self.dim else (size, width)

    def copies(self, parameter: Tensor, message: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of the message, the same part of the parameter): views of one shape, at most three pairs."""
        matrix = as_matrix(parameter)
        if self.dim == 1:
            yield message, matrix[self.low : self.high, self.start : self.stop]
            return
        columns = matrix[:, self.low : self.high]
        for begin, end, rows in _row_views(columns, self.place, self.start, self.stop):
            yield message[begin - self.start : end - self.start].view(rows.shape), rows


def _row_views(matrix: Tensor, place: Place, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
    """Rows [start, stop) of the interval as views of the parameter: whole blocks at once, and what is left before and
    after them."""
    block, period, offset = place.block, place.period, place.offset
    if block == period:
        yield start, stop, matrix[offset + start : offset + stop]
        return
    blocks = matrix.unflatten(0, (-1, period))[:, offset : offset + block]
    first, last = -(-start // block), stop // block
    if first > last:  # within one block
        yield start, stop, blocks[last, start - last * block : stop - last * block]
        return
    if start < first * block:
        yield start, first * block, blocks[first - 1, start - (first - 1) * block :]
    if first < last:
        yield first * block, last * block, blocks[first:last]
    if last * block < stop:
        yield last * block, stop, blocks[last, : stop - last * block]


@dataclass(frozen=True, slots=True)
class TargetSlice:
    """Where a transfer goes in a vLLM parameter of the receiving rank."""

    parameter: str
    expert: int
    """Place in a parameter that holds all of the rank's experts; -1: it holds none."""
    dim: int
    start: int
    """[start, stop) of the parameter."""
    stop: int
    low: int
    high: int

    def view(self, parameter: Tensor) -> Tensor:
        """The box to copy the message into."""
        matrix = as_matrix(parameter[self.expert] if self.expert >= 0 else parameter)
        if self.dim == 1:
            return matrix[self.low : self.high, self.start : self.stop]
        return matrix[self.start : self.stop, self.low : self.high]


def as_matrix(tensor: Tensor) -> Tensor:
    """[n] -> [n, 1]; a matrix as it is."""
    return tensor[:, None] if tensor.ndim == 1 else tensor


def source_slice(layout: BridgeLayout, rank: int, transfer: np.void) -> SourceSlice:
    """What sending rank `rank` takes."""
    piece, actor, shape = layout.model.pieces[transfer["piece"]], layout.actor, layout.model.shape
    shard = rank % actor.tp if piece.is_split else 0
    before = shard * source_width(piece, shape, actor.tp)
    name = piece.rule.megatron.format(layer=transfer["layer"], expert=transfer["expert"])
    is_copy = piece.rule.is_vocab and actor.pp > 1 and rank // actor.stage_size == actor.pp - 1
    start, stop = int(transfer["start"]) - before, int(transfer["stop"]) - before
    return SourceSlice(
        "output_layer.weight" if is_copy else name, source_place(piece, shape, actor.tp), piece.dim, start, stop,
        int(transfer["low"]), int(transfer["high"]),
    )  # fmt: skip


def target_slice(layout: BridgeLayout, tp_rank: int, transfer: np.void) -> TargetSlice:
    """Where it goes in the parameters of vLLM's rank `tp_rank`."""
    piece, rollout, shape = layout.model.pieces[transfer["piece"]], layout.rollout, layout.model.shape
    whole = rollout.expert_parallel
    first, _ = target_interval(piece, shape, rollout.tp, tp_rank, whole_experts=whole)
    shift = target_offset(piece, layout.model, rollout.tp, tp_rank, whole_experts=whole) - first
    expert = int(transfer["expert"])
    expert = expert - target_experts(layout, tp_rank)[0] if expert >= 0 else -1
    return TargetSlice(
        target_name(piece, int(transfer["layer"])), expert, piece.dim, int(transfer["start"]) + shift,
        int(transfer["stop"]) + shift, int(transfer["low"]), int(transfer["high"]),
    )  # fmt: skip
