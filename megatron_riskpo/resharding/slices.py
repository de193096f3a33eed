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

    def views(self, parameter: Tensor) -> Iterator[Tensor]:
        """What the message holds, row by row: at most three views of the parameter."""
        matrix = as_matrix(parameter)
        if self.dim == 1:
            yield matrix[self.low : self.high, self.start : self.stop]
        else:
            yield from _row_views(matrix[:, self.low : self.high], self.place, self.start, self.stop)

    def copy(self, parameter: Tensor, message: Tensor) -> None:
        """Into a tensor of the message's shape, strided or not."""
        begin = 0
        for rows in self.views(parameter):
            end = begin + rows.numel() // message.shape[1]
            message[begin:end].view(rows.shape).copy_(rows)
            begin = end


def _row_views(matrix: Tensor, place: Place, start: int, stop: int) -> Iterator[Tensor]:
    """Rows [start, stop) of the interval as views of the parameter: whole blocks at once, and what is left before and
    after them."""
    block, period, offset = place.block, place.period, place.offset
    if block == period:
        yield matrix[offset + start : offset + stop]
        return
    blocks = matrix.unflatten(0, (-1, period))[:, offset : offset + block]
    first, last = -(-start // block), stop // block
    if first > last:  # within one block
        yield blocks[last, start - last * block : stop - last * block]
        return
    if start < first * block:
        yield blocks[first - 1, start - (first - 1) * block :]
    if first < last:
        yield blocks[first:last]
    if last * block < stop:
        yield blocks[last, : stop - last * block]


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
    before = rank % piece.num_shards(actor) * source_width(piece, shape, actor)
    name = piece.rule.megatron.format(layer=transfer["layer"], expert=transfer["expert"])
    is_copy = piece.rule.is_vocab and actor.pp > 1 and rank // actor.stage_size == actor.pp - 1
    start, stop = int(transfer["start"]) - before, int(transfer["stop"]) - before
    return SourceSlice(
        "output_layer.weight" if is_copy else name, source_place(piece, shape, actor), piece.dim, start, stop,
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
