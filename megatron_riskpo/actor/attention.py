"""Core attention on torch's scaled_dot_product_attention, where TransformerEngine is not there.

Megatron's own DotProductAttention refuses packed sequences. Here packed sequences of like length are put side by
side and padded at their end: with a causal mask no real query ever sees a padded key, so no mask tensor is needed
and a few batched calls serve any number of sequences.
Legend: t tokens, b sequences, s length, n query heads, g key-value heads, h head size.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_riskpo.actor.sequence_split import zigzag

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
    """For one packed micro-batch: where each token sits once its sequence stands padded in its bucket.

    Under context parallelism queries are this rank's tokens, keys those of the whole pack.
    """

    def __init__(self, cu_seqlens: Tensor, cp_size: int = 1, cp_rank: int = 0) -> None:
        device = cu_seqlens.device
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        self.keys: list[Tensor] = []
        """A bucket each: int64 [b, s], the token at each place (padding repeats the sequence's last token)."""
        self.queries: list[Tensor] = []
        """The same of the queries: int64 [b, s / cp_size]."""
        self.masks: list[Tensor | None] = []
        """A bucket each: bool [b, 1, s / cp_size, s], which key a query sees; None: it is causal, no mask needed."""
        self.place_of_query = torch.empty(int(cu_seqlens[-1]) // cp_size, dtype=torch.long, device=device)
        """int64: each query's place in the buckets laid end to end."""
        owner, place = zigzag(lengths, cp_size)
        self.gathered = owner * (owner.numel() // cp_size) + place
        """int64 [t]: where each token of the pack lies once the ranks' tokens are laid end to end."""
        position = torch.arange(owner.numel(), device=device) - starts.repeat_interleave(lengths)
        position = position[owner == cp_rank]
        num_places = 0
        for bucket in length_buckets(lengths.tolist()):
            keys, _ = _padded_rows(starts[bucket], lengths[bucket])
            queries, real = _padded_rows(starts[bucket] // cp_size, lengths[bucket] // cp_size)
            places = torch.arange(queries.numel(), device=device).view_as(queries)
            self.place_of_query[queries[real]] = places[real] + num_places
            num_places += queries.numel()
            self.keys.append(keys)
            self.queries.append(queries)
            column = torch.arange(keys.size(1), device=device)
            self.masks.append((column <= position[queries][..., None])[:, None] if cp_size > 1 else None)


def _padded_rows(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """[b, longest]: the tokens of each sequence, its last one repeated to the end, and which of them are real."""
    column = torch.arange(int(lengths.max()), device=starts.device)
    rows = starts[:, None] + torch.minimum(column[None], lengths[:, None] - 1)
    return rows, column[None] < lengths[:, None]


class SDPACoreAttention(MegatronModule):
    """Causal self-attention for sbhd batches, packed (thd) sequences, and decoding with a KV cache."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.cp = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None
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
        key, value = self._whole_sequences(key, value, buckets)
        outs = []
        for queries, keys, mask in zip(buckets.queries, buckets.keys, buckets.masks, strict=True):
            padded = [_select(query, queries), _select(key, keys), _select(value, keys)]
            outs.append(self._batched(*padded, mask=mask).flatten(0, 1))
        return torch.cat(outs).index_select(0, buckets.place_of_query).flatten(1)

    def _whole_sequences(self, key: Tensor, value: Tensor, buckets: SequenceBuckets) -> tuple[Tensor, Tensor]:
        """Keys and values [t, g, h] of the pack, from those of this rank's tokens; the way back sums gradients."""
        if self.cp is None:
            return key, value
        joined = torch.cat([key, value], dim=-1).contiguous()
        whole = gather_from_sequence_parallel_region(joined, tensor_parallel_output_grad=True, group=self.cp)
        key, value = whole.index_select(0, buckets.gathered).split([key.size(-1), value.size(-1)], dim=-1)
        return key, value

    def _batched(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, s, n, h] -> [b, s, n, h]; with fewer queries than keys the queries are the last positions."""
        num_queries, num_keys = query.size(1), key.size(1)
        if mask is None and 1 < num_queries < num_keys:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(num_keys - num_queries)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and num_queries == num_keys and num_queries > 1,
            scale=self.scale, enable_gqa=q.size(1) != k.size(1),
        )  # fmt: skip
        return out.transpose(1, 2)


def _select(tokens: Tensor, rows: Tensor) -> Tensor:
    """tokens[rows]; the backward of index_select (index_add) is many times faster on the CPU than that of indexing."""
    return tokens.index_select(0, rows.flatten()).unflatten(0, rows.shape)
