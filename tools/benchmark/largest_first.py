"""The planner that this project had before: the reference of packing.py, a transcription of commit 37ba3bb.

Ranks hold equally many sequences; tokens are balanced, not work; every micro-batch is looked at for every sequence.
"""

from collections.abc import Sequence


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


def _overfull(bins: list[list[int]], lengths: Sequence[int], max_tokens: int) -> bool:
    return any(len(members) > 1 and sum(lengths[i] for i in members) > max_tokens for members in bins)


def largest_first_plan(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """plan[rank][micro_batch] = sequence indices. num_ranks must divide len(lengths)."""
    per_rank = _largest_first(lengths, num_ranks, bin_capacity=len(lengths) // num_ranks)
    rank_lengths = [[lengths[i] for i in rows] for rows in per_rank]
    num_bins = max(_bins_needed(of_rank, max_tokens) for of_rank in rank_lengths)
    bins = [_largest_first(of_rank, num_bins) for of_rank in rank_lengths]
    while any(_overfull(members, of_rank, max_tokens) for members, of_rank in zip(bins, rank_lengths, strict=True)):
        num_bins += 1
        bins = [_largest_first(of_rank, num_bins) for of_rank in rank_lengths]
    return [
        [[rows[i] for i in micro_batch] for micro_batch in members]
        for members, rows in zip(bins, per_rank, strict=True)
    ]
