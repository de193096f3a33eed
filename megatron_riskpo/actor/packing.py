"""A packed micro-batch: the sequences that go through the model together, end to end, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_riskpo.actor.attention import SequenceBuckets
from megatron_riskpo.rollout.types import Rollouts


class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, and the buckets that SDPACoreAttention works on."""

    @cached_property
    def buckets(self) -> SequenceBuckets:
        """Worked out by the first layer that asks, shared by the others."""
        return SequenceBuckets(self.cu_seqlens_q)


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences; t tokens, n targets (the response tokens of all sequences, in order)."""

    rows: tuple[int, ...]
    """Which sequences of the batch these are."""
    input_ids: Tensor
    """int64 [1, t]."""
    position_ids: Tensor
    """int64 [1, t]: position in its own sequence."""
    packed: PackedSequences
    """Boundaries of the sequences."""
    predictor: Tensor
    """int64 [n]: for each target the position in the pack that predicts it (the token before)."""
    targets: Tensor
    """int64 [n]."""
    response_lengths: Tensor
    """int64 [len(rows)]; sums to n."""


def pack(rollouts: Rollouts, rows: Sequence[int], pad_to_multiple: int, device: torch.device) -> MicroBatch:
    """Lay the given sequences end to end. Under sequence parallelism the total must divide by the
    tensor-parallel size: `pad_to_multiple` adds a last dummy sequence without targets."""
    chosen = rollouts.select(rows)
    lengths = chosen.lengths
    padding = -int(lengths.sum()) % pad_to_multiple
    if padding:
        lengths = torch.cat([lengths, torch.tensor([padding])])
    tokens = torch.nn.functional.pad(chosen.tokens, (0, padding))
    starts = lengths.cumsum(0) - lengths
    position_ids = torch.arange(tokens.numel()) - starts.repeat_interleave(lengths)
    num_rows = len(rows)
    first_target = (starts[:num_rows] + chosen.prompt_lengths).repeat_interleave(chosen.response_lengths)
    response_starts = chosen.response_lengths.cumsum(0) - chosen.response_lengths
    offset = torch.arange(first_target.numel()) - response_starts.repeat_interleave(chosen.response_lengths)
    target_positions = first_target + offset
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)
    longest = int(lengths.max())
    packed = PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return MicroBatch(
        rows=tuple(rows),
        input_ids=tokens[None].to(device),
        position_ids=position_ids[None].to(device),
        packed=packed,
        predictor=(target_positions - 1).to(device),
        targets=tokens[target_positions].to(device),
        response_lengths=chosen.response_lengths.to(device),
    )
