"""Rewards of low precision as the numbers that they stand for: a float32 0.1 is 0.1 and not 0.10000000149.

Only then do tenths, hundredths and thirds lie on a lattice, where complete pairing is exact.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Decimal digits that survive a round trip through the type: a number of as many stands for itself only.
_DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 6}

# More distinct numbers than the points of a lattice are no choice of a grader's.
_MOST_DISTINCT = 257

_LARGEST_DENOMINATOR = 16


def as_meant(values: Float[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """float64. Of bfloat16, float16 and float32: the decimal of the fewest digits that rounds to the same number, else
    the fraction of the least denominator up to 16 that does, else the number as it is. Moves nothing by more than half
    a unit in the type's last place."""
    exact = values.double()
    if values.dtype not in _DIGITS or not (exact != exact.round()).any():
        return exact
    distinct, place = exact.unique(return_inverse=True)
    if distinct.numel() > _MOST_DISTINCT:
        return exact
    found, open_ = distinct.clone(), torch.ones_like(distinct, dtype=torch.bool)
    for candidate in _candidates(distinct, _DIGITS[values.dtype]):
        fits = open_ & (candidate.to(values.dtype).double() == distinct)
        found = torch.where(fits, candidate, found)
        open_ &= ~fits
    return found[place]


def _candidates(values: Float64[Tensor, " n"], most_digits: int) -> Iterator[Float64[Tensor, " n"]]:
    exponent = values.abs().clamp(min=torch.finfo(torch.float64).tiny).log10().floor().clamp(-200, 200)
    for digits in range(1, most_digits + 1):
        places = digits - 1 - exponent
        # Whole numbers times or over a power of ten, as a decimal is read: both are exact up to 10^22.
        up, down = 10.0 ** places.clamp(min=0), 10.0 ** (-places).clamp(min=0)
        yield (values * up / down).round() * down / up
    for denominator in range(3, _LARGEST_DENOMINATOR + 1):
        yield (values * denominator).round() / denominator
