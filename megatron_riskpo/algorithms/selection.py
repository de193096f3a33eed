"""Quantiles of very many scores without a sort: the exact order statistics, in memory that does not grow with them.

A radix selection (Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units"): read float64 as
integers of the same order, count the leading 16 bits, keep the bin that holds the wanted position, go on with the next
16 bits inside it. Four rounds give the score itself, bit for bit. Only counts leave a round, and those of several
processes add up.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from megatron_riskpo.algorithms.distribution import LEVEL_ROUNDING

DIGIT_BITS = 16
NUM_ROUNDS = 64 // DIGIT_BITS
NUM_BINS = 2**DIGIT_BITS
CHUNK = 2**18
"""Scores worked on at a time: 2 MiB, and as much for each intermediate result."""

_SIGN = -(2**63)
_NAN_BIN = 0xFFF8
"""Leading digit of the one NaN that `_ordered_bits` leaves; infinity's is 0xFFF0."""


def select_quantiles(
    scores: Float[Tensor, " n"],
    levels: Sequence[float],
    combine: Callable[[Int64[Tensor, "rows bins"]], Int64[Tensor, "rows bins"]] = lambda counts: counts,
) -> tuple[float, ...]:
    """inf{x : F(x) >= u} for each level u in (0, 1]: what sorting gives, -0.0 counted (and returned) as 0.0.

    Memory beside the scores: (len(levels) + 1) histograms of 512 KiB and a few chunks. `combine` turns this process's
    counts into those of all scores, if other processes hold some. Raises ValueError (in every process alike) for NaN
    and for no score at all.
    """
    counts = combine(_count_digits(scores, 0, [0]))
    if counts[0, _NAN_BIN]:
        raise ValueError(f"{int(counts[0, _NAN_BIN])} scores are NaN: they have no quantiles")
    num_scores = int(counts.sum())
    wanted = [quantile_index(num_scores, level) for level in levels]
    counts = counts.expand(len(levels), -1)
    prefixes = [0] * len(levels)
    for digit in range(NUM_ROUNDS):
        if digit:
            counts = combine(_count_digits(scores, digit, prefixes))
        for row, index in enumerate(wanted):
            chosen, wanted[row] = _bin_of(counts[row], index)
            prefixes[row] = prefixes[row] << DIGIT_BITS | chosen
    return tuple(_score_of(bits) for bits in prefixes)


def quantile_index(num_scores: int, level: float) -> int:
    """Position of a level's quantile in the sorted scores, from 0: the least k with (k + 1) / num_scores >= level.

    Compared in float64 with the same allowance for rounding as `Distribution.quantiles`, so that both agree always.
    Raises ValueError where there is no score, or the level is none.
    """
    if not num_scores:
        raise ValueError("there are no scores, so no quantiles")
    if not 0 < level <= 1:
        raise ValueError(f"level = {level} is no quantile level: 0 < level <= 1 is needed")
    least = level * (1 - LEVEL_ROUNDING)
    # The rounded product is off by one at most.
    index = min(max(math.ceil(least * num_scores) - 2, 0), num_scores - 1)
    while index < num_scores - 1 and (index + 1) / num_scores < least:
        index += 1
    return index


def quantiles_of_sorted(ascending: Float64[Tensor, " n"], levels: Sequence[float]) -> tuple[float, ...]:
    """The same quantiles, where the scores are sorted already. Raises ValueError as `select_quantiles` does."""
    # A sort puts NaN last.
    num_nan = int(ascending[-1:].isnan().any()) and int(ascending.isnan().sum())
    if num_nan:
        raise ValueError(f"{num_nan} scores are NaN: they have no quantiles")
    # + 0.0: a -0.0 becomes 0.0.
    return tuple(float(ascending[quantile_index(ascending.numel(), level)]) + 0.0 for level in levels)


def _count_digits(scores: Tensor, digit: int, prefixes: Sequence[int]) -> Int64[Tensor, "rows bins"]:
    """How often each value of a 16-bit digit follows each prefix (the digits before it)."""
    shift = 64 - DIGIT_BITS * (digit + 1)
    counts = torch.zeros(len(prefixes), NUM_BINS, dtype=torch.int64)
    for chunk in scores.split(CHUNK):
        leading = _ordered_bits(chunk) >> shift
        values = leading & (NUM_BINS - 1)
        for row, prefix in enumerate(prefixes):
            inside = values[leading >> DIGIT_BITS == _signed(prefix, DIGIT_BITS * digit)] if digit else values
            counts[row] += torch.bincount(inside, minlength=NUM_BINS)
    return counts


def _ordered_bits(scores: Float[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """64 bits a score that, read as an UNSIGNED integer, are in the order of the scores."""
    # + 0.0: both zeros are one score. All NaN are one as well, above infinity.
    canonical = torch.where(scores.isnan(), torch.nan, scores.double() + 0.0)
    bits = canonical.contiguous().view(torch.int64)
    # Negative: the more bits, the smaller, so all are flipped. Positive: the sign bit is set, above all negative ones.
    return torch.where(bits < 0, ~bits, bits ^ _SIGN)


def _score_of(bits: int) -> float:
    """The inverse of `_ordered_bits`."""
    signed = _signed(bits, 64)
    original = signed ^ _SIGN if signed < 0 else ~signed
    return float(torch.tensor(original, dtype=torch.int64).view(torch.float64))


def _signed(value: int, num_bits: int) -> int:
    """The int64 that an arithmetic shift makes of these leading bits."""
    return value - 2**num_bits if value >> (num_bits - 1) else value


def _bin_of(counts: Int64[Tensor, " bins"], index: int) -> tuple[int, int]:
    """The bin that holds the score of this position, and its position inside the bin."""
    sums = counts.cumsum(0)
    chosen = int(torch.searchsorted(sums, index, right=True))
    return chosen, index - (int(sums[chosen - 1]) if chosen else 0)
