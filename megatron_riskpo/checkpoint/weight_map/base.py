"""How one family's parameters are called, fused and split: the rules that loading, export and bridge share.

A rule joins one Megatron parameter to the Hugging Face tensors it is made of. Tensor parallelism splits each
Hugging Face tensor along `shard_dim`, then the rank's pieces are fused; so fuse and unfuse only ever see one
rank's pieces, and any tensor-parallel size follows from the same table.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelShape:
    """What the rules need to know of a model."""

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    num_experts: int = 0
    """Of a mixture-of-experts layer; 0: every layer is dense."""


@dataclass(frozen=True)
class Fusion:
    """How the pieces of one rank become one Megatron tensor, and back."""

    fuse: Callable[[Sequence[Tensor], ModelShape], Tensor]
    unfuse: Callable[[Tensor, ModelShape], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (layer written as {layer}, expert as {expert}) and its Hugging Face tensors."""

    megatron: str
    hf: tuple[str, ...]
    shard_dim: int | None
    """Dimension of each Hugging Face tensor that tensor parallelism splits (of an expert's, expert tensor parallelism);
    None: every rank has the whole."""
    fusion: Fusion
    is_vocab: bool = False
    """Dimension 0 counts vocabulary entries, padded so that the tensor-parallel size divides it."""

    expert: int | None = None
    """Which expert's it is: expert parallelism deals them out in blocks."""

    @property
    def is_expert(self) -> bool:
        """Whether the parameter exists once an expert."""
        return "{expert}" in self.megatron

    def at(self, layer: int, expert: int | None = None) -> "Rule":
        """The same rule with the numbers filled in."""
        names = tuple(name.format(layer=layer, expert=expert) for name in self.hf)
        megatron = self.megatron.format(layer=layer, expert=expert)
        return dataclasses.replace(self, megatron=megatron, hf=names, expert=expert)


def _fuse_qkv(pieces: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """q [n*h, ...], k and v [g*h, ...] -> rows ordered by key-value group: its queries, its key, its value."""
    q, k, v = pieces
    num_groups = k.size(0) // shape.head_dim
    parts = [t.reshape(num_groups, -1, *t.shape[1:]) for t in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def _unfuse_qkv(fused: Tensor, shape: ModelShape) -> list[Tensor]:
    queries_per_group = shape.num_attention_heads // shape.num_key_value_heads
    rows = [queries_per_group * shape.head_dim, shape.head_dim, shape.head_dim]
    grouped = fused.reshape(-1, sum(rows), *fused.shape[1:])
    return [part.reshape(-1, *fused.shape[1:]) for part in grouped.split(rows, dim=1)]


SINGLE = Fusion(lambda pieces, shape: pieces[0], lambda fused, shape: [fused])
STACKED = Fusion(lambda pieces, shape: torch.cat(list(pieces)), lambda fused, shape: list(fused.chunk(2)))
QKV = Fusion(_fuse_qkv, _unfuse_qkv)


@dataclass(frozen=True)
class Family:
    """A model family: its table of names, and the Megatron settings that its architecture asks for."""

    model_type: str
    """`model_type` in config.json."""
    layer_rules: tuple[Rule, ...]
    outer_rules: tuple[Rule, ...]
    """Embedding, final norm, output layer (left out when the embeddings are tied)."""
    transformer_options: Callable[[Mapping[str, Any]], dict[str, Any]]
    """From config.json: the arguments of Megatron's TransformerConfig that are this family's own."""
    fixed: Mapping[str, tuple[object, object]] = field(default_factory=dict)
    """Options of config.json that change the architecture: the one value that is computed rightly, and what
    transformers takes where the option is missing."""

    def refusal(self, hf_config: Mapping[str, Any]) -> str | None:
        """What to say of a config.json that asks for what this table would silently compute otherwise."""
        for option, (needed, default) in self.fixed.items():
            value = hf_config.get(option, default)
            if (value or None) != (needed or None):
                found, supported = json.dumps(value), json.dumps(needed)
                return f"config.json: {option} = {found} is not supported for {self.model_type}; only {supported} is"
        return None

    def rules(self, shape: ModelShape) -> Iterator[Rule]:
        """Every parameter of a whole model once, in Hugging Face's usual order (embedding first, head last)."""
        for template, layer in self.templates(shape):
            experts = range(shape.num_experts) if template.is_expert else (None,)
            yield from (template.at(layer, expert) for expert in experts)

    def templates(self, shape: ModelShape) -> Iterator[tuple[Rule, int]]:
        """(rule, layer) of a whole model, in the same order; a rule of experts once for all of them."""
        first, *last = self.outer_rules
        yield first, 0
        for layer in range(shape.num_layers):
            yield from ((rule, layer) for rule in self.layer_rules)
        for rule in last:
            if not (shape.tied_embeddings and rule.megatron == "output_layer.weight"):
                yield rule, 0


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The smallest multiple of tp_size that holds the vocabulary."""
    return -(-vocab_size // tp_size) * tp_size


def pad_vocab(tensor: Tensor, num_rows: int) -> Tensor:
    """Zero rows at the end, up to num_rows."""
    missing = num_rows - tensor.size(0)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing > 0 else tensor
