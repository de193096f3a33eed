"""Distributions of sums of independent lattice rewards, and means over all but one of them.

n groups of `size` questions; the rewards of each question lie on `points` points.
"""

from functools import reduce
from itertools import accumulate

import torch
from jaxtyping import Float64
from torch import Tensor

# Shorter distributions are convolved term by term: faster than a transform, and exact to the last digits.
_DIRECT_POINTS = 33

# A transform leaves masses up to about 1e-16, of either sign, where there are none: scores that no bundle has.
_NO_MASS = 1e-15


def convolve(a: Float64[Tensor, "n a_points"], b: Float64[Tensor, "n b_points"]) -> Float64[Tensor, "n points"]:
    """The distributions of a's plus b's value, row by row."""
    if a.size(1) > b.size(1):
        a, b = b, a
    num_points = a.size(1) + b.size(1) - 1
    if a.size(1) > _DIRECT_POINTS:
        length = _fast_length(num_points)
        product = torch.fft.rfft(a, length) * torch.fft.rfft(b, length)
        return torch.nn.functional.threshold(torch.fft.irfft(product, length)[:, :num_points], _NO_MASS, 0.0)
    total = torch.zeros(a.size(0), num_points, dtype=torch.float64)
    for shift in range(a.size(1)):
        total[:, shift : shift + b.size(1)] += a[:, shift, None] * b
    return total


def means_over_the_others(
    masses: Float64[Tensor, "n size points"], psi: Float64[Tensor, "n_or_1 sum_points"]
) -> Float64[Tensor, "n size points"]:
    """E[psi(v + the other questions' values)] for each question of a group and each value v of its own.

    sum_points = size * (points - 1) + 1.
    """
    if masses.size(2) > _DIRECT_POINTS:
        return _transformed_means(masses, psi)
    questions = list(masses.unbind(1))
    nothing = torch.ones(masses.size(0), 1, dtype=torch.float64)
    before = list(accumulate(questions, convolve, initial=nothing))
    after = list(accumulate(reversed(questions), convolve, initial=nothing))[::-1]
    others = torch.stack([convolve(*sides) for sides in zip(before[:-1], after[1:], strict=True)], dim=1)
    # windows[:, v, t] = psi(v + t), t the sum of the others.
    windows = psi.unfold(1, others.size(2), 1)
    return others @ windows.transpose(1, 2)


def _transformed_means(masses: Tensor, psi: Tensor) -> Tensor:
    """The same by the correlation theorem."""
    num_points, length = masses.size(2), _fast_length(psi.size(1))
    transforms = list(torch.fft.rfft(masses, length).unbind(1))
    before = list(accumulate(transforms[:-1], torch.mul, initial=torch.ones_like(transforms[0])))
    after = list(accumulate(reversed(transforms[1:]), torch.mul, initial=torch.ones_like(transforms[0])))[::-1]
    of_psi = torch.fft.rfft(psi, length)
    means = [
        torch.fft.irfft(torch.mul(*sides).conj() * of_psi, length)[:, :num_points]
        for sides in zip(before, after, strict=True)
    ]
    # A mean of numbers <= 0, but for the transform's rounding.
    return torch.stack(means, dim=1).clamp(max=0)


def _fast_length(least: int) -> int:
    """The next length that transforms split well: 2, 3 or 5 times a power of 2, or one itself."""
    return min(odd << max(0, (-(-least // odd) - 1).bit_length()) for odd in (1, 3, 5))


def sum_masses(masses: Float64[Tensor, "n size points"]) -> Float64[Tensor, "n sum_points"]:
    """The distribution of the sum over each group's questions."""
    return reduce(convolve, masses.unbind(1))
