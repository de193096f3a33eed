"""How one family's parameters are called, fused and split: the rules that loading, export and bridge share.

A rule joins one Megatron parameter to the Hugging Face tensors it is made of. Tensor parallelism splits each
Hugging Face tensor along `shard_dim`, then the rank's pieces are fused; so fuse and unfuse only ever see one
rank's pieces, and any tensor-parallel size follows from the same table.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Fusion:
    """How the pieces of one rank become one Megatron tensor, and back."""

    fuse: Callable[[Sequence[Tensor], ModelShape], Tensor]
    unfuse: Callable[[Tensor, ModelShape], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (layer written as {layer}) and its Hugging Face tensors."""

    megatron: str
    hf: tuple[str, ...]
    shard_dim: int | None
    """Dimension of each Hugging Face tensor that tensor parallelism splits; None: every rank has the whole."""
    fusion: Fusion
    is_vocab: bool = False
    """Dimension 0 counts vocabulary entries, padded so that the tensor-parallel size divides it."""

    def at(self, layer: int) -> "Rule":
        """The same rule with the layer's number filled in."""
        names = tuple(name.format(layer=layer) for name in self.hf)
        return Rule(self.megatron.format(layer=layer), names, self.shard_dim, self.fusion, self.is_vocab)


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
    transformer_options: dict[str, object]
    """Arguments of Megatron's TransformerConfig."""

    def rules(self, shape: ModelShape) -> Iterator[Rule]:
        """Every parameter of a whole model once, in Hugging Face's usual order (embedding first, head last)."""
        first, *last = self.outer_rules
        yield first
        for layer in range(shape.num_layers):
            for rule in self.layer_rules:
                yield rule.at(layer)
        for rule in last:
            if not (shape.tied_embeddings and rule.megatron == "output_layer.weight"):
                yield rule


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The smallest multiple of tp_size that holds the vocabulary."""
    return -(-vocab_size // tp_size) * tp_size


def pad_vocab(tensor: Tensor, num_rows: int) -> Tensor:
    """Zero rows at the end, up to num_rows."""
    missing = num_rows - tensor.size(0)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing > 0 else tensor
