"""The arithmetic of RiskPO's released code, which is not its paper's (https://arxiv.org/abs/2510.00911).

For comparison only: docs/risk.md says where the two part.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.functional import pad

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs, Estimate
from megatron_riskpo.algorithms.advantages.groups import EPS
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.distribution import Distribution

# Questions whose rewards spread less than this are not divided by their spread.
_LEAST_STD = 1e-3
# Below this the deviations of a paper's responses are shares of nothing.
_LEAST_SUM = 1e-6


def riskpo_reference(inputs: AdvantageInputs) -> Estimate:
    """Risk weights of papers against the other papers of the same bundle, shared by a rule of credit.

    A bundle is bundle_size consecutive questions (the last one what is left), its paper j their j-th responses, S the
    paper's sum of rewards, q_a and q_b the bundle's interpolated quantiles of S, w = reference_mix_weight:

        A = (w lower + middle) / (w + 1) / (unbiased std of the bundle's S + 1e-6)
        lower = -(q_a - S)^+ / (alpha + 1e-6)
        middle = ((S - q_a)^+ - (S - q_b)^+ [+ q_a - q_b: reference_natural_baseline]) / (beta - alpha + 1e-6)

    reported: the quantiles of all bundles' scores together.
    """
    config = inputs.config
    scores = _bundle_sums(inputs.rewards, config.bundle_size)
    of_papers = _paper_advantages(scores, config)
    advantages = of_papers.repeat_interleave(config.bundle_size, dim=0)[: inputs.rewards.size(0)]
    credited = _CREDITS[config.reference_credit](advantages, inputs.rewards, config.bundle_size)
    pooled = Distribution.of_sample(scores.flatten())
    return Estimate(credited, pooled, (pooled.quantile(config.alpha), pooled.quantile(config.beta)), inputs.tracker)


def _bundle_sums(
    values: Float64[Tensor, "num_prompts columns"], bundle_size: int
) -> Float64[Tensor, "num_bundles columns"]:
    missing = -values.size(0) % bundle_size
    return pad(values, (0, 0, 0, missing)).unflatten(0, (-1, bundle_size)).sum(dim=1)


def _paper_advantages(
    scores: Float64[Tensor, "num_bundles group_size"], config: AlgorithmConfig
) -> Float64[Tensor, "num_bundles group_size"]:
    levels = torch.tensor([config.alpha, config.beta], dtype=torch.float64)
    q_alpha, q_beta = torch.quantile(scores, levels, dim=1, keepdim=True)
    lower = -(q_alpha - scores).clamp(min=0) / (config.alpha + EPS)
    middle = (scores - q_alpha).clamp(min=0) - (scores - q_beta).clamp(min=0)
    if config.reference_natural_baseline:
        middle = middle + q_alpha - q_beta
    middle = middle / (config.beta - config.alpha + EPS)
    weight = config.reference_mix_weight
    return (weight * lower + middle) / (weight + 1) / (_unbiased_std(scores) + EPS)


def _unbiased_std(values: Float64[Tensor, "rows group_size"]) -> Float64[Tensor, "rows 1"]:
    # 0 for a group of one instead of NaN: with one paper both quantiles are its score, and all advantages 0.
    return values.std(dim=1, keepdim=True, correction=min(1, values.size(1) - 1))


def _uniform(advantages: Tensor, rewards: Tensor, bundle_size: int) -> Tensor:
    return advantages


def _score(advantages: Tensor, rewards: Tensor, bundle_size: int) -> Tensor:
    return torch.where(rewards > 0, 0.5, 1.5) * advantages


def _std(advantages: Tensor, rewards: Tensor, bundle_size: int) -> Tensor:
    std = _unbiased_std(rewards)
    return advantages / (torch.where(std <= _LEAST_STD, 1.0, std) + EPS)


def _sum_mean(advantages: Tensor, rewards: Tensor, bundle_size: int) -> Tensor:
    deviations = rewards - rewards.mean(dim=1, keepdim=True)
    ones = torch.ones_like(deviations)
    total, num_questions = (
        _bundle_sums(values, bundle_size).repeat_interleave(bundle_size, dim=0)[: len(rewards)]
        for values in (deviations, ones)
    )
    return advantages * torch.where(total.abs() <= _LEAST_SUM, 1 / num_questions, deviations / total)


# [num_prompts, group_size] advantages of the responses' papers, and rewards, to the responses' own advantages.
_CREDITS: Mapping[str, Callable[[Tensor, Tensor, int], Tensor]] = MappingProxyType(
    {"uniform": _uniform, "score": _score, "std": _std, "sum_mean": _sum_mean}
)
