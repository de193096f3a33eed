"""Which sequences go together: ragged rollouts to data-parallel ranks and micro-batches. Lengths in, indices out.

Ranks wait for each other when all their micro-batches are done, so the work of whole ranks is balanced first: each
sequence, heaviest first, goes to the rank with the least work. Within a rank the same rule fills as few micro-batches
as the token budget allows. Where that is too tight for it, best-fit packs to within a few tokens, and balances nothing.
All of it takes O(n log n) comparisons.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heapreplace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_riskpo.actor.flops import ModelFlops

BIN_BITS = 20
"""Of a bin's number, in an integer that holds its work or room above them: a tuple would be slower to compare."""

Numbers = TypeVar("Numbers", float, NDArray[np.float64])

MicroBatches = list[list[int]]
"""Sequence indices of each."""

RESERVE = 0.25
"""Share of a rank's spare tokens that no sequence may take: micro-batches filled to the last token are hard to find."""


@dataclass(frozen=True)
class WorkModel:
    """The work of a sequence of s tokens: s * linear + s^2 * quadratic, in any unit. By default its tokens."""

    linear: float = 1.0
    quadratic: float = 0.0

    @classmethod
    def from_hf_config(cls, hf_config: Mapping[str, Any]) -> "WorkModel":
        """FLOPs of a model, with all tokens through the output layer: most of a rollout's are the response's."""
        flops = ModelFlops.from_hf_config(hf_config)
        return cls(flops.per_token + flops.per_target, flops.per_squared_length)

    def of(self, num_tokens: Numbers) -> Numbers:
        """The work of a sequence, or of each of an array's."""
        return num_tokens * self.linear + num_tokens**2 * self.quadratic


@dataclass(frozen=True)
class _Sequences:
    """What planning needs to know of them, longest and so heaviest first. Below, a row is a place in this order.

    Lists, since single elements are looked up; in the order in which they will be.
    """

    indices: list[int]
    """The sequence's index among the lengths given."""
    tokens: list[int]
    """A sequence longer than the budget counts as one of just the budget: nothing fits beside it."""
    works: list[int]
    """In units of 2^-24 of the largest, times 2^BIN_BITS. Sums of integers do not depend on their order."""
    max_tokens: int

    @classmethod
    def of(cls, lengths: Sequence[int], max_tokens: int, work: WorkModel) -> "_Sequences":
        array = np.asarray(lengths, dtype=np.int64)
        order = np.argsort(-array, kind="stable")
        array = array[order]
        amount = work.of(array.astype(np.float64))
        works = np.maximum(amount / amount[0] * 2.0**24, 1).astype(np.int64) << BIN_BITS
        return cls(order.tolist(), np.minimum(array, max_tokens).tolist(), works.tolist(), max_tokens)

    def count_tokens(self, rows: Sequence[int]) -> int:
        return sum([self.tokens[row] for row in rows])

    def work(self, rows: Sequence[int]) -> int:
        return sum([self.works[row] for row in rows])


def plan_micro_batches(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, work: WorkModel = WorkModel(), multiple_of: int = 1
) -> list[MicroBatches]:
    """plan[rank][micro_batch] = sequence indices; every rank has equally many micro-batches, a multiple of multiple_of.

    `lengths` are in tokens, at least 1. A micro-batch holds one sequence or more, together at most max_tokens but for a
    single longer sequence. A rank's micro-batches are in order of their work, heaviest first: those that the ranks run
    at the same time are alike. Raises ValueError where there are too few sequences to fill as many micro-batches as the
    budget makes necessary. That never happens where num_ranks * multiple_of divides their number, nor where it is no
    larger than their number and any two of them fit into a micro-batch.
    """
    least = num_ranks * multiple_of
    if len(lengths) < least:
        raise ValueError(
            f"{len(lengths)} sequences cannot fill {multiple_of} micro-batches on each of {num_ranks} data-parallel "
            f"ranks; give {least} or more"
        )
    if min(lengths) < 1:
        raise ValueError(f"sequence {list(lengths).index(min(lengths))} has {min(lengths)} tokens; it needs at least 1")
    sequences = _Sequences.of(lengths, max_tokens, work)
    plan = _balanced(sequences, num_ranks, multiple_of) or _dealt(sequences, num_ranks, multiple_of)
    _fill_up(plan, _round_up(max(map(len, plan)), multiple_of))
    indices = sequences.indices
    return [
        [sorted([indices[row] for row in rows]) for rows in sorted(bins, key=sequences.work, reverse=True)]
        for bins in plan
    ]


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _most(sequences: _Sequences, num_ranks: int, multiple_of: int) -> int:
    """Micro-batches that every rank can have with a sequence in each."""
    return len(sequences.tokens) // (num_ranks * multiple_of) * multiple_of


def _balanced(sequences: _Sequences, num_ranks: int, multiple_of: int) -> list[MicroBatches] | None:
    """Ranks of like work; some may still lack micro-batches. None where there are not enough sequences for it."""
    rows, max_tokens = range(len(sequences.tokens)), sequences.max_tokens
    total, most = sum(sequences.tokens), _most(sequences, num_ranks, multiple_of)
    for count in range(_round_up(-(-total // (max_tokens * num_ranks)), multiple_of), most + 1, multiple_of):
        room = count * max_tokens
        # One micro-batch a rank needs no reserve: what the rank holds, fits into it.
        reserve = int(RESERVE * (room - total / num_ranks)) if count > 1 else 0
        ranks = _lightest_first(sequences, rows, num_ranks, room - reserve)
        if ranks is not None:
            plan = _packed(sequences, ranks, count, multiple_of)
            return plan if max(map(len, plan)) <= most else None
    return None


def _packed(sequences: _Sequences, ranks: Sequence[list[int]], count: int, multiple_of: int) -> list[MicroBatches]:
    """Each rank's sequences in `count` micro-batches, or in so many more that they fit."""
    plan = [_spread(sequences, rows, count) or _best_fit(sequences, rows) for rows in ranks]
    needed = _round_up(max(map(len, plan)), multiple_of)
    if needed > count:
        plan = [_spread(sequences, rows, needed) or bins for rows, bins in zip(ranks, plan, strict=True)]
    return plan


def _spread(sequences: _Sequences, rows: Sequence[int], count: int) -> MicroBatches | None:
    """At most `count` micro-batches of like work; None where there is too little room."""
    spare = count * sequences.max_tokens - sequences.count_tokens(rows)
    # The last and shortest sequences would find gaps smaller than themselves: not worth the time of trying.
    if spare < count * sequences.tokens[rows[-1]]:
        return None
    bins = _lightest_first(sequences, rows, count, sequences.max_tokens)
    return [members for members in bins if members] if bins else None


def _lightest_first(sequences: _Sequences, rows: Sequence[int], num_bins: int, capacity: int) -> list[list[int]] | None:
    """Each of the rows, heaviest first, into the bin with the least work that has room for its tokens.

    A bin that had no room once only gets what fits nowhere else, the fullest such bin first. None where a sequence fits
    nowhere.
    """
    tokens, works = sequences.tokens, sequences.works
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    free, number = [capacity] * num_bins, (1 << BIN_BITS) - 1
    by_work, by_room = list(range(num_bins)), []
    for row in rows:
        size = tokens[row]
        while by_work:
            entry = by_work[0]
            chosen = entry & number
            if free[chosen] >= size:
                heapreplace(by_work, entry + works[row])
                break
            heappop(by_work)
            insort(by_room, free[chosen] << BIN_BITS | chosen)
        else:
            place = bisect_left(by_room, size << BIN_BITS)
            if place == len(by_room):
                return None
            entry = by_room.pop(place)
            chosen = entry & number
            insort(by_room, entry - (size << BIN_BITS))
        free[chosen] -= size
        bins[chosen].append(row)
    return bins


def _best_fit(sequences: _Sequences, rows: Sequence[int]) -> MicroBatches:
    """Few micro-batches: each of the rows, longest first, into the one that it leaves the least room in.

    As good as first-fit, about 11/9 of the fewest possible at worst; and the one with the least room that is enough is
    found by bisection, where first-fit goes through them all.
    """
    tokens, shortest = sequences.tokens, sequences.tokens[rows[-1]] << BIN_BITS
    bins: MicroBatches = []
    # Of the micro-batches that the shortest sequence still fits into, by room: a short list.
    by_room: list[int] = []
    for row in rows:
        size = tokens[row] << BIN_BITS
        place = bisect_left(by_room, size)
        if place < len(by_room):
            entry = by_room.pop(place)
            bins[entry & ((1 << BIN_BITS) - 1)].append(row)
        else:
            entry = sequences.max_tokens << BIN_BITS | len(bins)
            bins.append([row])
        entry -= size
        if entry >= shortest:
            insort(by_room, entry)
    return bins


def _dealt(sequences: _Sequences, num_ranks: int, multiple_of: int) -> list[MicroBatches]:
    """As few micro-batches as best-fit needs, dealt out by their work. For few long sequences, when ranks of like work
    would have more micro-batches than sequences."""
    bins = _best_fit(sequences, range(len(sequences.tokens)))
    count, most = _round_up(-(-len(bins) // num_ranks), multiple_of), _most(sequences, num_ranks, multiple_of)
    if count > most:
        raise ValueError(
            f"{len(sequences.tokens)} sequences need {len(bins)} micro-batches of {sequences.max_tokens} tokens, but "
            f"cannot fill more than {most} on each of {num_ranks} data-parallel ranks; raise the token budget, or give "
            f"{num_ranks * count} sequences or more"
        )
    bins.sort(key=sequences.work, reverse=True)
    plan: list[MicroBatches] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for start in range(0, len(bins), num_ranks):
        lightest = sorted(range(num_ranks), key=loads.__getitem__)
        for rank, members in zip(lightest, bins[start : start + num_ranks], strict=False):
            plan[rank].append(members)
            loads[rank] += sequences.work(members)
    return plan


def _fill_up(plan: list[MicroBatches], count: int) -> None:
    """Give every rank `count` micro-batches. The missing ones are made of a sequence each, the lightest of the
    micro-batch with most sequences: of the same rank where that has two."""
    for bins in plan:
        while len(bins) < count:
            donor = max(bins, key=len, default=[])
            if len(donor) < 2:
                donor = max((members for others in plan for members in others), key=len)
            bins.append([donor.pop()])
