"""Core attention on torch's scaled_dot_product_attention, where TransformerEngine is not there.

Megatron's own DotProductAttention refuses packed sequences. Here packed sequences of like length are put side by
side and padded at their end: with a causal mask no real query ever sees a padded key, so no mask tensor is needed
and a few batched calls serve any number of sequences.
Legend: t tokens, b sequences, s length, n query heads, g key-value heads, h head size.
"""

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

if TYPE_CHECKING:
    from megatron_riskpo.actor.packing import PackedSequences

MAX_PADDING_SHARE = 0.25


def length_buckets(lengths: list[int], max_padding_share: float = MAX_PADDING_SHARE) -> list[list[int]]:
    """Sequence indices grouped so that padding each group to its longest wastes at most the given share of it."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    buckets: list[list[int]] = []
    real = 0
    for i in order:
        if buckets:
            longest, count = lengths[buckets[-1][0]], len(buckets[-1])
            if real + lengths[i] >= (1 - max_padding_share) * longest * (count + 1):
                buckets[-1].append(i)
                real += lengths[i]
                continue
        buckets.append([i])
        real = lengths[i]
    return buckets


class SequenceBuckets:
    """For one packed micro-batch: where each token sits once its sequence stands padded in its bucket."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        starts = cu_seqlens.tolist()
        lengths = [b - a for a, b in itertools.pairwise(starts)]
        device = cu_seqlens.device
        self.rows: list[Tensor] = []
        """A bucket each: int64 [b, s], the token at each place (padding repeats the sequence's last token)."""
        place_of_token = torch.empty(starts[-1], dtype=torch.long, device=device)
        num_places = 0
        for bucket in length_buckets(lengths):
            start = torch.tensor([starts[i] for i in bucket], device=device)
            length = torch.tensor([lengths[i] for i in bucket], device=device)
            column = torch.arange(lengths[bucket[0]], device=device)
            rows = start[:, None] + torch.minimum(column[None], length[:, None] - 1)
            real = column[None] < length[:, None]
            places = torch.arange(rows.numel(), device=device).view_as(rows)[real] + num_places
            place_of_token[rows[real]] = places
            num_places += rows.numel()
            self.rows.append(rows)
        self.place_of_token = place_of_token
        """int64 [t]: each token's place in the buckets laid end to end."""


class SDPACoreAttention(MegatronModule):
    """Causal self-attention for sbhd batches, packed (thd) sequences, and decoding with a KV cache."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("SDPACoreAttention does not split sequences: context_parallel_size must be 1")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: "PackedSequences | None" = None,
    ) -> Tensor:
        """query [s, b, n, h] (packed [t, n, h]), key and value with g heads -> [s, b, n*h] (packed [t, n*h]).

        `attention_mask` is ignored: attention is causal within each sequence.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.buckets)
        out = self._batched(*(t.transpose(0, 1) for t in (query, key, value)))
        return out.transpose(0, 1).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, buckets: SequenceBuckets) -> Tensor:
        outs = []
        for rows in buckets.rows:
            # index_select: its backward (index_add) is many times faster on the CPU than that of query[rows]
            padded = [t.index_select(0, rows.flatten()).unflatten(0, rows.shape) for t in (query, key, value)]
            outs.append(self._batched(*padded).flatten(0, 1))
        return torch.cat(outs).index_select(0, buckets.place_of_token).flatten(1)

    def _batched(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, s, n, h] -> [b, s, n, h]; with fewer queries than keys the queries are the last positions."""
        num_queries, num_keys = query.size(1), key.size(1)
        mask = None
        if 1 < num_queries < num_keys:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(num_keys - num_queries)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=num_queries == num_keys and num_queries > 1,
            scale=self.scale, enable_gqa=q.size(1) != k.size(1),
        )  # fmt: skip
        return out.transpose(1, 2)
