"""The family table seen by the bridge: per Hugging Face tensor of a layer, where its numbers lie on either side.

Both sides cut a tensor along one dimension at most, `dim`. Along it a rank holds one interval; where that lies in the
rank's parameter is a formula of three numbers (`Place`), since Megatron keeps queries, keys and values interleaved by
key-value group and vLLM keeps them one after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.checkpoint.weight_map.base import QKV, STACKED, ModelShape, Rule, padded_vocab_size
from megatron_riskpo.checkpoint.weight_map.shapes import hf_shapes
from megatron_riskpo.errors import UsageError
from megatron_riskpo.resharding.layouts import ActorLayout

VLLM_VOCAB_PADDING = 64


@dataclass(frozen=True)
class Place:
    """Where the n-th index of a rank's interval is stored along the cut dimension of its parameter:
    offset + (n // block) * period + n % block."""

    block: int
    period: int
    offset: int


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor of a layer (or of an expert of a layer, or outside of the layers)."""

    rule: Rule
    index: int
    """Which of `rule.hf`."""
    shape: tuple[int, ...]
    dim: int
    """The dimension that either side cuts; 0 where neither does."""
    is_split: bool
    """Whether tensor parallelism cuts it, be it that of experts."""

    @property
    def length(self) -> int:
        """Size of the cut dimension."""
        return self.shape[self.dim]

    @property
    def width(self) -> int:
        """Size of the other one; 1 for a vector."""
        return prod(self.shape) // self.length

    @property
    def is_expert(self) -> bool:
        return self.rule.is_expert

    def num_shards(self, actor: ActorLayout) -> int:
        """Parts that the actor's ranks hold one each of: rank r holds part r % num_shards."""
        if not self.is_split:
            return 1
        return actor.etp if self.is_expert else actor.tp

    @property
    def is_layer(self) -> bool:
        return "{layer}" in self.rule.megatron


@dataclass(frozen=True)
class Model:
    """What a plan has to know of a model."""

    shape: ModelShape
    pieces: tuple[Piece, ...]
    """In the table's order: embedding, those of a layer, final norm, output layer."""

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> "Model":
        """From a config.json."""
        shape, family = shape_of(hf_config), family_of(hf_config)
        first, *last = family.outer_rules
        rules = [first, *family.layer_rules, *last]
        if shape.tied_embeddings:
            rules = [rule for rule in rules if rule.megatron != "output_layer.weight"]
        return cls(shape, tuple(piece for rule in rules for piece in _pieces(rule, hf_config)))


def _pieces(rule: Rule, hf_config: Mapping[str, Any]) -> list[Piece]:
    dim, is_split = rule.shard_dim or 0, rule.shard_dim is not None
    return [Piece(rule, i, shape, dim, is_split) for i, shape in enumerate(hf_shapes(rule, hf_config))]


def source_width(piece: Piece, model: ModelShape, actor: ActorLayout) -> int:
    """Indices of the cut dimension on an actor rank (with a padded vocabulary more than there are, at the end)."""
    shards = piece.num_shards(actor)
    if piece.rule.is_vocab:
        return padded_vocab_size(piece.length, shards) // shards
    option = "actor.etp" if piece.is_expert else "actor.tp"
    return _divided(piece, shards, option, model.head_dim if piece.rule.fusion is QKV else 1)


def source_place(piece: Piece, model: ModelShape, actor: ActorLayout) -> Place:
    """In an actor rank's Megatron parameter."""
    width = source_width(piece, model, actor)
    if piece.rule.fusion is QKV:
        size = model.head_dim
        queries = model.num_attention_heads // model.num_key_value_heads * size
        block, offset = ((queries, 0), (size, queries), (size, queries + size))[piece.index]
        return Place(block, queries + 2 * size, offset)
    return Place(width, width, width * piece.index if piece.rule.fusion is STACKED else 0)


def target_interval(piece: Piece, model: ModelShape, tp: int, tp_rank: int, *, whole_experts: bool) -> tuple[int, int]:
    """[start, stop) along the cut dimension that a vLLM rank holds."""
    if piece.is_expert and whole_experts:
        return 0, piece.length
    if piece.rule.is_vocab:
        rows = target_rows(piece, tp)
        return min(tp_rank * rows, piece.length), min((tp_rank + 1) * rows, piece.length)
    if not piece.is_split:
        return 0, piece.length
    if piece.rule.fusion is QKV and piece.index > 0 and tp > model.num_key_value_heads:
        if tp % model.num_key_value_heads:
            raise UsageError(
                f"rollout.tp = {tp} is no multiple of the {model.num_key_value_heads} key-value heads, which vLLM "
                "would have to repeat; choose a multiple or a divisor"
            )
        head = tp_rank * model.num_key_value_heads // tp
        return head * model.head_dim, (head + 1) * model.head_dim
    size = _divided(piece, tp, "rollout.tp", model.head_dim if piece.rule.fusion is QKV else 1)
    return tp_rank * size, (tp_rank + 1) * size


def target_rows(piece: Piece, tp: int) -> int:
    """Rows of the vocabulary in a vLLM rank's parameter, padding included."""
    padded = -(-piece.length // VLLM_VOCAB_PADDING) * VLLM_VOCAB_PADDING
    if padded % tp:
        raise UsageError(f"rollout.tp = {tp} does not divide vLLM's {padded} rows of the vocabulary; choose a divisor")
    return padded // tp


def target_name(piece: Piece, layer: int) -> str:
    """vLLM's name of the parameter that holds the tensor; that of experts has all of the rank's, expert first."""
    name = piece.rule.hf[piece.index].replace("{layer}", str(layer))
    if piece.is_expert:
        fused = "w13_weight" if piece.rule.fusion is STACKED else "w2_weight"
        return f"{name.partition('experts.')[0]}experts.routed_experts.{fused}"
    if piece.rule.fusion is QKV:
        return name.replace(f".{'qkv'[piece.index]}_proj.", ".qkv_proj.")
    if piece.rule.fusion is STACKED:
        return name.replace(".gate_proj.", ".gate_up_proj.").replace(".up_proj.", ".gate_up_proj.")
    return name


def module_of(parameter: str) -> str:
    """The module of vLLM's that has the parameter: it is packed as a whole."""
    return parameter.rpartition(".")[0]


def module_numbers(model: Model) -> np.ndarray:
    """int64 [pieces]: the same for pieces that a layer of vLLM's keeps in one module."""
    modules = [module_of(target_name(piece, 0)) for piece in model.pieces]
    return np.array([modules.index(module) for module in modules])


def target_offset(piece: Piece, model: Model, tp: int, tp_rank: int, *, whole_experts: bool) -> int:
    """Where the tensor's interval starts along the cut dimension of vLLM's parameter: after those fused before it."""
    if piece.rule.fusion not in (QKV, STACKED):
        return 0
    before = [other for other in model.pieces if other.rule == piece.rule and other.index < piece.index]
    intervals = [target_interval(p, model.shape, tp, tp_rank, whole_experts=whole_experts) for p in before]
    return sum(stop - start for start, stop in intervals)


def _divided(piece: Piece, tp: int, option: str, unit: int = 1) -> int:
    if piece.length % (tp * unit):
        raise UsageError(
            f"{option} = {tp} does not divide the {piece.length // unit} {'heads' if unit > 1 else 'indices'} of "
            f"dimension {piece.dim} of {piece.rule.hf[piece.index]}; choose a divisor"
        )
    return piece.length // tp
