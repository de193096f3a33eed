"""Constants taken off risk weights, and their scale."""

import math
from typing import Literal

from jaxtyping import Float64
from torch import Tensor

# No scaled advantage is larger than the inverse of this: with tracked quantiles all bundles can have the same
# advantage other than 0, whose standard deviation is 0.
_LEAST_SPREAD = 0.1
# Equal scores summed from unequal rewards differ by a few times 1e-16 of their size: that is no advantage to scale up.
_ROUNDING = 1e-12


def subtract_baseline(
    weights: Float64[Tensor, "num_prompts group_size"],
    baseline: Literal["natural", "leave_one_out", "mean"],
    siblings: int,
) -> Float64[Tensor, "num_prompts group_size"]:
    """Take the baseline off; it depends on no response of the bundle it is taken off (up to 1/N for `mean`).

    natural: nothing, the weights stay <= 0. leave_one_out: mean weight of the question's responses in OTHER bundles;
    `siblings` of its group_size responses share a bundle. mean: mean weight of the batch.
    """
    if baseline == "leave_one_out":
        others = weights.sum(dim=1, keepdim=True) - siblings * weights
        return weights - others / (weights.shape[1] - siblings)
    if baseline == "mean":
        return weights - _exact_mean(weights)
    return weights


def scale_advantages(
    advantages: Float64[Tensor, "num_prompts group_size"], scale: Literal["none", "batch_std"], largest_score: float
) -> Float64[Tensor, "num_prompts group_size"]:
    """Divide by the standard deviation over the batch, or by a tenth of the largest |A| where that is more.

    Finite always, and indifferent to the unit of the rewards. `largest_score` is the largest |S|: advantages that are
    rounding errors beside it stay as they are.
    """
    largest = float(advantages.abs().max())
    if scale == "none" or largest <= _ROUNDING * largest_score:
        return advantages
    std = math.sqrt(_exact_mean((advantages - _exact_mean(advantages)).square()))
    return advantages / max(std, _LEAST_SPREAD * largest)


def _exact_mean(values: Tensor) -> float:
    # fsum is correctly rounded: the same bits whatever the number of threads a rank adds with.
    return math.fsum(values.flatten().tolist()) / values.numel()
