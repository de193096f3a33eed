"""Which sequences go together: ragged rollouts to data-parallel ranks and packed micro-batches. No padding."""

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


def _largest_first(lengths: Sequence[int], num_bins: int, bin_capacity: int | None = None) -> list[list[int]]:
    """Each sequence, longest first, into the least loaded bin (that holds fewer than bin_capacity sequences)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        open_bins = [b for b in range(num_bins) if bin_capacity is None or len(bins[b]) < bin_capacity]
        lightest = min(open_bins, key=lambda b: (loads[b], b))
        bins[lightest].append(i)
        loads[lightest] += lengths[i]
    return [sorted(members) for members in bins]


def _bins_needed(lengths: Sequence[int], max_tokens: int) -> int:
    """Micro-batches that hold these sequences within the budget (first-fit, longest first)."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = next((b for b, load in enumerate(loads) if load + length <= max_tokens), None)
        if fitting is None:
            loads.append(length)
        else:
            loads[fitting] += length
    return len(loads)


def plan_micro_batches(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """plan[rank][micro_batch] = sequence indices; every rank has equally many sequences and micro-batches.

    `lengths` are in tokens; a micro-batch holds at most max_tokens, but for a single longer sequence. num_ranks must
    divide len(lengths).
    """
    if len(lengths) % num_ranks:
        raise ValueError(f"{len(lengths)} sequences do not divide over {num_ranks} data-parallel ranks")
    per_rank = _largest_first(lengths, num_ranks, bin_capacity=len(lengths) // num_ranks)
    rank_lengths = [[lengths[i] for i in rows] for rows in per_rank]
    num_bins = max(_bins_needed(of_rank, max_tokens) for of_rank in rank_lengths)
    bins = [_largest_first(of_rank, num_bins) for of_rank in rank_lengths]
    # Balancing fills bins otherwise than first-fit did, and may need one more.
    while any(_overfull(members, of_rank, max_tokens) for members, of_rank in zip(bins, rank_lengths, strict=True)):
        num_bins += 1
        bins = [_largest_first(of_rank, num_bins) for of_rank in rank_lengths]
    return [
        [[rows[i] for i in micro_batch] for micro_batch in members]
        for members, rows in zip(bins, per_rank, strict=True)
    ]


def _overfull(bins: list[list[int]], lengths: Sequence[int], max_tokens: int) -> bool:
    return any(len(members) > 1 and sum(lengths[i] for i in members) > max_tokens for members in bins)


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
