"""The actor's weights as Hugging Face tensors, one at a time, on every rank.

Per Megatron parameter: hand this rank's tensor-parallel piece from the expert-parallel rank and the pipeline stage
that own it to the others, undo Megatron's fusion, gather the pieces. No more than one parameter is whole at a time.
"""

from collections.abc import Iterator, Sequence
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
    stage: int
    """Pipeline stage that has it."""
    expert_rank: int | None
    """Rank of the expert-parallel group that has it; None: all have."""
    local_shape: tuple[int, ...]
    """Shape of the tensor-parallel piece."""
    dtype: torch.dtype


def plan_export(chunks: Sequence[PolicyModel], family: Family, shape: ModelShape, grid: RankGrid) -> list[ExportItem]:
    """Which stage has what; collective over the pipeline group, needed once a model."""
    mine = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in named_parameters(chunks)}
    stages: list[dict | None] = [None] * grid.pp.size()
    dist.all_gather_object(stages, mine, group=grid.pp)
    num_local = shape.num_experts // grid.ep.size()
    items = []
    for rule, general in _rules_with_local_name(family, shape, grid.ep.rank(), num_local):
        stage = next((stage for stage, names in enumerate(stages) if general in (names or {})), None)
        if stage is None:
            raise KeyError(f"no pipeline stage has a parameter {general}; the {family.model_type} table is wrong")
        expert_rank = rule.expert // num_local if rule.expert is not None and grid.ep.size() > 1 else None
        items.append(ExportItem(rule, stage, expert_rank, *stages[stage][general]))  # type: ignore[index]
    return items


def _rules_with_local_name(
    family: Family, shape: ModelShape, ep_rank: int, num_local: int
) -> Iterator[tuple[Rule, str]]:
    """Every rule, and the name of the parameter on this expert-parallel rank that has the same shape and stage."""
    for template, layer in family.templates(shape):
        if not template.is_expert:
            yield template.at(layer), template.at(layer).megatron
            continue
        for expert in range(shape.num_experts):
            here = ep_rank * num_local + expert % num_local
            yield template.at(layer, expert), template.at(layer, here).megatron


def export_weights(
    chunks: Sequence[PolicyModel], plan: list[ExportItem], shape: ModelShape, grid: RankGrid
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) pairs in the same order on every rank; collective, so exhaust it."""
    parameters = dict(named_parameters(chunks))
    for item in plan:
        local = _share(item, parameters.get(item.rule.megatron), grid)
        pieces = item.rule.fusion.unfuse(local, shape)
        for name, piece in zip(item.rule.hf, pieces, strict=True):
            whole = _gather(piece, item.rule.shard_dim, grid.split_group(of_expert=item.rule.expert is not None))
            yield name, whole[: shape.vocab_size] if item.rule.is_vocab else whole


def _share(item: ExportItem, parameter: Tensor | None, grid: RankGrid) -> Tensor:
    """The tensor-parallel piece, on every rank: from the expert-parallel rank that has it to the others of its stage,
    then from that stage to the others."""
    on_stage = grid.pp.rank() == item.stage
    is_shared = grid.pp.size() > 1 or item.expert_rank is not None
    if parameter is not None and on_stage:
        local = parameter.detach()
        # A broadcast wants memory that it may write to, of whichever rank.
        local = local.clone() if is_shared else local
    else:
        local = torch.empty(item.local_shape, dtype=item.dtype, device=grid.device)
    if on_stage and item.expert_rank is not None:
        dist.broadcast(local, src=dist.get_global_rank(grid.ep, item.expert_rank), group=grid.ep)
    if grid.pp.size() > 1:
        dist.broadcast(local, src=dist.get_global_rank(grid.pp, item.stage), group=grid.pp)
    return local


def _gather(piece: Tensor, shard_dim: int | None, group: dist.ProcessGroup) -> Tensor:
    if shard_dim is None or group.size() == 1:
        return piece
    piece = piece.contiguous()
    pieces = [torch.empty_like(piece) for _ in range(group.size())]
    dist.all_gather(pieces, piece, group=group)
    return torch.cat(pieces, dim=shard_dim)
