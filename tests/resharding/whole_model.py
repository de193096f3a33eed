"""Made-up whole Hugging Face tensors, cut by hand into what an actor rank and a vLLM rank hold."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megatron_riskpo.checkpoint.weight_map.base import STACKED, Rule, pad_vocab, padded_vocab_size
from megatron_riskpo.resharding.schedule import BridgeLayout


@lru_cache(maxsize=4096)
def whole(name: str, shape: tuple[int, ...]) -> Tensor:
    """Positive numbers that tell tensors, and places in them, apart."""
    seed = sum(ord(letter) * (i + 1) for i, letter in enumerate(name))
    return torch.arange(torch.Size(shape).numel()).reshape(shape) * 1009 + seed + 1


@lru_cache(maxsize=2)
def _rules(layout: BridgeLayout) -> list[tuple[Rule, list[Tensor]]]:
    """Every rule of the model, numbers filled in, with its whole tensors."""
    model, found = layout.model, []
    by_rule = {piece.rule: [p for p in model.pieces if p.rule == piece.rule] for piece in model.pieces}
    for template, pieces in by_rule.items():
        layers = range(model.shape.num_layers) if pieces[0].is_layer else [None]
        experts = range(model.shape.num_experts) if template.is_expert else [None]
        for layer in layers:
            for expert in experts:
                rule = template.at(layer, expert)  # type: ignore[arg-type]
                tensors = [whole(name, piece.shape) for name, piece in zip(rule.hf, pieces, strict=True)]
                found.append((rule, tensors))
    return found


def _stage_of_layer(layout: BridgeLayout, layer: int) -> int:
    """By Megatron's rule, said otherwise than `stage_layers` does."""
    actor, layers = layout.actor, layout.model.shape.num_layers
    if actor.first_stage_layers:  # the strategies make two stages then
        return int(layer >= actor.first_stage_layers)
    per_chunk = layers // actor.pp // actor.vp
    return layer // per_chunk % actor.pp


def actor_parameters(layout: BridgeLayout, rank: int) -> dict[str, Tensor]:
    """Megatron parameters of a rank, fused from its pieces as the loader does."""
    stage, in_stage = divmod(rank, layout.actor.world_size // layout.actor.pp)
    of_experts = np.arange(layout.actor.stage_size).reshape(-1, layout.actor.ep, layout.actor.etp)
    _, ep_rank, etp_rank = (int(index[0]) for index in np.nonzero(of_experts == in_stage))
    return _held(layout, stage, in_stage % layout.actor.tp, ep_rank, etp_rank)


@lru_cache(maxsize=64)
def _held(layout: BridgeLayout, stage: int, tp_rank: int, ep_rank: int, etp_rank: int) -> dict[str, Tensor]:
    actor, shape, held = layout.actor, layout.model.shape, {}
    for rule, tensors in _rules(layout):
        names = [rule.megatron]
        if rule.is_vocab and rule.megatron.startswith("embedding"):
            names = [rule.megatron] if stage == 0 else []
            if shape.tied_embeddings and actor.pp > 1 and stage == actor.pp - 1:
                names = ["output_layer.weight"]
        elif ".layers." in rule.megatron:
            layer = int(rule.megatron.split(".")[2])
            names = names if stage == _stage_of_layer(layout, layer) else []
        else:
            names = names if stage == actor.pp - 1 else []
        if rule.expert is not None and rule.expert // (shape.num_experts // actor.ep) != ep_rank:
            names = []
        if rule.is_vocab:
            tensors = [pad_vocab(tensor, padded_vocab_size(shape.vocab_size, actor.tp)) for tensor in tensors]
        if rule.shard_dim is not None:
            size, part = (actor.tp, tp_rank) if rule.expert is None else (actor.etp, etp_rank)
            tensors = [tensor.chunk(size, dim=rule.shard_dim)[part] for tensor in tensors]
        for name in names:
            held[name] = rule.fusion.fuse(tensors, shape)
    return held


@lru_cache(maxsize=32)
def rollout_parameters(layout: BridgeLayout, tp_rank: int) -> dict[str, Tensor]:
    """vLLM parameters of a rank, sliced from whole tensors as its weight loaders slice them."""
    tp, shape, held = layout.rollout.tp, layout.model.shape, {}
    experts: dict[str, list[Tensor]] = {}
    for rule, tensors in _rules(layout):
        name = rule.hf[0]
        if rule.expert is not None:
            fused = "w13_weight" if rule.fusion is STACKED else "w2_weight"
            parameter = name[: name.index("experts.")] + "experts.routed_experts." + fused
            experts.setdefault(parameter, []).append(_expert(layout, tensors, rule))
        elif rule.is_vocab:
            rows = (shape.vocab_size + 63) // 64 * 64 // tp
            held[name] = pad_vocab(tensors[0][tp_rank * rows : (tp_rank + 1) * rows], rows)
        elif "q_proj" in name:
            replicas = max(1, tp // shape.num_key_value_heads)
            q = tensors[0].chunk(tp)[tp_rank]
            k, v = (tensor.chunk(tp // replicas)[tp_rank // replicas] for tensor in tensors[1:])
            held[name.replace("q_proj", "qkv_proj")] = torch.cat([q, k, v])
        elif "gate_proj" in name:
            merged = torch.cat([tensor.chunk(tp)[tp_rank] for tensor in tensors])
            held[name.replace("gate_proj", "gate_up_proj")] = merged
        elif rule.shard_dim == 1:
            held[name] = tensors[0].chunk(tp, dim=1)[tp_rank]
        else:
            held[name] = tensors[0]
    for parameter, parts in experts.items():
        held[parameter] = torch.stack(_local_experts(layout, tp_rank, parts))
    return held | _split_experts(layout, tp_rank, held, experts)


def module_bytes(parameters: dict[str, Tensor]) -> dict[str, int]:
    """By vLLM's module."""
    sizes: dict[str, int] = {}
    for name, tensor in parameters.items():
        module = name[: name.rindex(".")]
        sizes[module] = sizes.get(module, 0) + tensor.nbytes
    return sizes


def _expert(layout: BridgeLayout, tensors: list[Tensor], rule: Rule) -> Tensor:
    return torch.stack(tensors) if rule.fusion is STACKED else tensors[0]


def _local_experts(layout: BridgeLayout, tp_rank: int, parts: list[Tensor]) -> list[Tensor]:
    """vLLM's linear placement, by its map of experts."""
    if not layout.rollout.expert_parallel:
        return parts
    base, rest = divmod(len(parts), layout.rollout.tp)
    owner = [rank for rank in range(layout.rollout.tp) for _ in range(base + (rank < rest))]
    return [part for part, rank in zip(parts, owner, strict=True) if rank == tp_rank] or [parts[0][..., :0]]


def _split_experts(
    layout: BridgeLayout, tp_rank: int, held: dict[str, Tensor], experts: dict[str, list[Tensor]]
) -> dict[str, Tensor]:
    """gate and up one below the other, each cut by rows, down by columns; whole with expert parallelism."""
    tp = 1 if layout.rollout.expert_parallel else layout.rollout.tp
    rank = 0 if layout.rollout.expert_parallel else tp_rank
    cut = {}
    for name in experts:
        if name.endswith("w13_weight"):
            cut[name] = held[name].chunk(tp, dim=2)[rank].flatten(1, 2)
        else:
            cut[name] = held[name].chunk(tp, dim=2)[rank]
    return cut
