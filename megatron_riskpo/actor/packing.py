"""A packed micro-batch: the sequences that go through the model together, end to end, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_riskpo.actor.attention import SequenceBuckets
from megatron_riskpo.actor.sequence_split import SequenceSplit, zigzag
from megatron_riskpo.rollout.types import Rollouts


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, and the buckets that SDPACoreAttention works on."""

    split: SequenceSplit = SequenceSplit()

    @cached_property
    def buckets(self) -> SequenceBuckets:
        """Worked out by the first layer that asks, shared by the others."""
        return SequenceBuckets(self.cu_seqlens_q, self.split.cp_size, self.split.cp_rank)


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences: the tokens of one context-parallel rank (all of them without context parallelism).

    t tokens on this rank; n targets (the response tokens of all sequences, in order), m of them predicted here.
    """

    rows: tuple[int, ...]
    """Which sequences of the batch these are."""
    input_ids: Tensor
    """int64 [1, t]."""
    position_ids: Tensor
    """int64 [1, t]: position in its own sequence."""
    packed: PackedSequences
    """Boundaries of the whole sequences."""
    predictor: Tensor
    """int64 [m]: for each target the place among this rank's tokens that predicts it (the token before)."""
    targets: Tensor
    """int64 [m]."""
    slots: Tensor
    """int64 [m]: where these targets stand among all n."""
    response_lengths: Tensor
    """int64 [len(rows)]; sums to n."""
    num_targets: int
    """n, known without asking the device."""


def pack(rollouts: Rollouts, rows: Sequence[int], split: SequenceSplit, device: torch.device) -> MicroBatch:
    """Lay the given sequences end to end and take this rank's share.

    Context parallelism asks for sequences, sequence parallelism for a pack whose length divides: sequences get
    trailing tokens, the pack a last dummy sequence. Causal attention does not see what comes after, and neither has
    targets.
    """
    chosen = rollouts.select(rows)
    tokens, lengths = _pad_sequences(chosen.tokens, chosen.lengths, split)
    starts = lengths.cumsum(0) - lengths
    position_ids = torch.arange(tokens.numel()) - starts.repeat_interleave(lengths)
    first_target = (starts[: len(rows)] + chosen.prompt_lengths).repeat_interleave(chosen.response_lengths)
    response_starts = chosen.response_lengths.cumsum(0) - chosen.response_lengths
    offset = torch.arange(first_target.numel()) - response_starts.repeat_interleave(chosen.response_lengths)
    target_positions = first_target + offset
    owner, place = zigzag(lengths, split.cp_size)
    mine = owner == split.cp_rank
    slots = mine[target_positions - 1].nonzero()[:, 0]
    predictors, targets = place[target_positions - 1], tokens[target_positions]
    return MicroBatch(
        rows=tuple(rows),
        input_ids=tokens[mine][None].to(device),
        position_ids=position_ids[mine][None].to(device),
        packed=_describe(lengths, split, device),
        predictor=predictors[slots].to(device),
        targets=targets[slots].to(device),
        slots=slots.to(device),
        response_lengths=chosen.response_lengths.to(device),
        num_targets=target_positions.numel(),
    )


def _pad_sequences(tokens: Tensor, lengths: Tensor, split: SequenceSplit) -> tuple[Tensor, Tensor]:
    """Tokens (padding is token 0) and lengths that `split` can divide."""
    padded = lengths + -lengths % split.sequence_multiple
    starts, real_starts = padded.cumsum(0) - padded, lengths.cumsum(0) - lengths
    total = int(padded.sum())
    out = tokens.new_zeros(total + -total % split.pack_multiple)
    out[torch.arange(tokens.numel()) + (starts - real_starts).repeat_interleave(lengths)] = tokens
    if out.numel() > total:
        padded = torch.cat([padded, torch.tensor([out.numel() - total])])
    return out, padded


def _describe(lengths: Tensor, split: SequenceSplit, device: torch.device) -> PackedSequences:
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)
    longest = int(lengths.max())
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        split=split,
    )
