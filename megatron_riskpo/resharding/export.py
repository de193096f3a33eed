"""The actor's weights as Hugging Face tensors, one at a time, on every rank.

Per Megatron parameter: gather its tensor-parallel pieces, undo Megatron's fusion, hand the result from the pipeline
stage that owns it to the others. No more than one parameter is whole at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.actor.model import PolicyModel, named_parameters
from megatron_riskpo.checkpoint.weight_map.base import Family, ModelShape, Rule
from megatron_riskpo.distributed.grid import RankGrid


@dataclass(frozen=True)
class ExportItem:
    """One Megatron parameter of the whole model."""

    rule: Rule
    owner: int
    """Pipeline stage that sends it."""
    local_shape: tuple[int, ...]
    """Shape of the owner's tensor-parallel piece."""
    dtype: torch.dtype


def plan_export(model: PolicyModel, family: Family, shape: ModelShape, grid: RankGrid) -> list[ExportItem]:
    """Which stage has what; collective over the pipeline group, needed once a model."""
    mine = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in named_parameters(model)}
    stages: list[dict | None] = [None] * grid.pp.size()
    dist.all_gather_object(stages, mine, group=grid.pp)
    items = []
    for rule in family.rules(shape):
        owner = next((stage for stage, names in enumerate(stages) if rule.megatron in (names or {})), None)
        if owner is None:
            raise KeyError(f"no pipeline stage has a parameter {rule.megatron}; the {family.model_type} table is wrong")
        items.append(ExportItem(rule, owner, *stages[owner][rule.megatron]))  # type: ignore[index]
    return items


def export_weights(
    model: PolicyModel, plan: list[ExportItem], shape: ModelShape, grid: RankGrid
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) pairs in the same order on every rank; collective, so exhaust it."""
    parameters = dict(named_parameters(model))
    for item in plan:
        is_owner = grid.pp.rank() == item.owner
        if is_owner:
            local = parameters[item.rule.megatron].detach()
        else:
            local = torch.empty(item.local_shape, dtype=item.dtype, device=grid.device)
        if grid.pp.size() > 1:
            local = local.clone() if is_owner else local
            dist.broadcast(local, src=dist.get_global_rank(grid.pp, item.owner), group=grid.pp)
        pieces = item.rule.fusion.unfuse(local, shape)
        for name, piece in zip(item.rule.hf, pieces, strict=True):
            whole = _gather(piece, item.rule.shard_dim, grid)
            yield name, whole[: shape.vocab_size] if item.rule.is_vocab else whole


def _gather(piece: Tensor, shard_dim: int | None, grid: RankGrid) -> Tensor:
    if shard_dim is None or grid.tp.size() == 1:
        return piece
    piece = piece.contiguous()
    pieces = [torch.empty_like(piece) for _ in range(grid.tp.size())]
    dist.all_gather(pieces, piece, group=grid.tp)
    return torch.cat(pieces, dim=shard_dim)
