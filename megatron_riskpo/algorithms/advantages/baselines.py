"""Constants taken off risk weights, and their scale."""

import math
from functools import reduce
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.distribution import Distribution

# Equal scores summed from unequal rewards differ by a few times 1e-16 of their size: that is no advantage to scale up.
_ROUNDING = 1e-12


def subtract_baseline(
    weights: Float64[Tensor, "num_prompts group_size"],
    baseline: Literal["natural", "leave_one_out", "mean"],
    siblings: int,
) -> Float64[Tensor, "num_prompts group_size"]:
    """Take the baseline off; it depends on no response of the bundle it is taken off (up to 1/N for `mean`).

    natural: nothing, the weights stay <= 0. leave_one_out: mean weight of the question's responses in OTHER bundles;
    `siblings` of its group_size responses share a bundle (averaged over all subsets of them, too: the mean over the
    subsets without a response is (sum - siblings * own) / (group_size - siblings)). mean: mean weight of the batch.
    """
    if baseline == "leave_one_out":
        others = weights.sum(dim=1, keepdim=True) - siblings * weights
        return weights - others / (weights.shape[1] - siblings)
    if baseline == "mean":
        return weights - _exact_mean(weights)
    return weights


def scale_advantages(
    advantages: Float64[Tensor, "num_prompts group_size"],
    config: AlgorithmConfig,
    scores: Distribution,
    score_stds: Float64[Tensor, " num_prompts"] | None,
) -> Float64[Tensor, "num_prompts group_size"]:
    """Divide as config.scale says; by config.scale_floor of the largest |A| at least, so that they stay finite.

    batch_std: by the standard deviation over the batch. bundle_std: by `score_stds`, those of the scores of each
    question's group (None: batch_std). `scores` has one row: advantages that are rounding errors beside its largest |S|
    stay as they are.
    """
    if config.scale == "none":
        return advantages
    largest = float(advantages.abs().max())
    if largest <= _ROUNDING * max(map(abs, scores.support())):
        return advantages
    least = config.scale_floor * largest
    if score_stds is not None:
        return advantages / score_stds.clamp(min=least)[:, None]
    std = math.sqrt(_exact_mean((advantages - _exact_mean(advantages)).square()))
    return advantages / max(std, least)


def _exact_mean(values: Tensor) -> float:
    # One addition after the other, and fsum, which is correctly rounded: the same bits whatever the number of threads a
    # rank adds with.
    return math.fsum(reduce(torch.add, values.unbind(1)).tolist()) / values.numel()
