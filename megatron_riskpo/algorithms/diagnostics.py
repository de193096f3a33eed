"""Metrics of a step's rewards and advantages. All of them are plain floats of the whole batch."""

import math

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.spectra import cvar, mvar, rvar

NUM_PASS_RATE_BINS = 5
EFFECTIVE_WEIGHT = "risk/effective_weight/"


def risk_metrics(scores: Distribution, quantiles: tuple[float, float], config: AlgorithmConfig) -> dict[str, float]:
    """The quantiles in use, and the risk measures of the scores (one row) at the configured levels."""
    return {
        "risk/q_alpha": quantiles[0],
        "risk/q_beta": quantiles[1],
        "risk/mvar": mvar(scores, config.alpha, config.beta, config.omega),
        "risk/rvar": rvar(scores, config.alpha, config.beta),
        "risk/cvar": cvar(scores, config.alpha),
    }


def reward_metrics(rewards: Float64[Tensor, "num_prompts group_size"]) -> dict[str, float]:
    """Mean reward; shares of questions that all or none of their responses solve (solved: reward > 0), and of those
    whose rewards are all equal."""
    lowest, highest = rewards.aminmax(dim=1)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/solve_all": _share(lowest > 0),
        "reward/solve_none": _share(highest <= 0),
        "reward/zero_variance": _share(lowest == highest),
    }


def advantage_metrics(
    rewards: Float64[Tensor, "num_prompts group_size"], advantages: Float64[Tensor, "num_prompts group_size"]
) -> dict[str, float]:
    """Share of responses that teach nothing (|A| < 1e-8), and the effective weights by difficulty."""
    return {"risk/zero_advantage_share": _share(advantages.abs() < 1e-8)} | effective_weights(rewards, advantages)


def effective_weights(
    rewards: Float64[Tensor, "num_prompts group_size"], advantages: Float64[Tensor, "num_prompts group_size"]
) -> dict[str, float]:
    """How strongly the advantages push questions of each difficulty: `risk/effective_weight/<pass-rate bin>`.

    A question's weight is the regression slope of its advantages on its rewards, averaged over the questions of a bin:
    the coefficient of its own REINFORCE gradient, but for what its advantages have in common where that depends on its
    own rewards (natural baseline with the quantiles of the question alone). The pass rate is the share of responses
    with reward > 0. Questions whose rewards are all equal have no slope and bins without questions are left out.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = centred.square().sum(dim=1)
    lowest, highest = rewards.aminmax(dim=1)
    # By comparison: the centred values of equal rewards need not be exactly 0.
    varied = (lowest < highest) & (spread > 0)
    # The mean advantage drops out, because the centred rewards sum to 0.
    weights = (centred * advantages).sum(dim=1) / spread
    bins = ((rewards > 0).sum(dim=1) * NUM_PASS_RATE_BINS // rewards.shape[1]).clamp(max=NUM_PASS_RATE_BINS - 1)
    # Questions without a slope go into a bin behind the last, which is not read.
    bins = torch.where(varied, bins, NUM_PASS_RATE_BINS)
    counts, sums = torch.bincount(bins).tolist(), torch.bincount(bins, weights).tolist()
    return {
        f"{EFFECTIVE_WEIGHT}{index / NUM_PASS_RATE_BINS:.1f}-{(index + 1) / NUM_PASS_RATE_BINS:.1f}": total / count
        for index, (total, count) in enumerate(zip(sums, counts, strict=True))
        if count and index < NUM_PASS_RATE_BINS
    }


def cov_logprob_advantage(
    mean_logprobs: Float[Tensor, "num_prompts group_size"],
    advantages: Float[Tensor, "num_prompts group_size"],
    rewards: Float[Tensor, "num_prompts group_size"],
) -> dict[str, float]:
    """Covariance, over the responses to the same question, of the mean token log-prob with the advantage
    (`risk/cov_logprob_advantage`), and with the reward, which is the mean objective's advantage
    (`risk/cov_logprob_reward`). Their sizes compare as correlations: `risk/corr_logprob_...`.

    A policy-gradient step changes the entropy by minus the learning rate times about this (arXiv 2505.22617), so its
    sign says whether the entropy falls. With one response a question it is taken over all responses.
    """
    logprobs = _centred(mean_logprobs)
    metrics = {}
    for name, values in (("advantage", _centred(advantages)), ("reward", _centred(rewards))):
        spread = math.sqrt(float(logprobs.square().mean()) * float(values.square().mean()))
        covariance = float((logprobs * values).mean())
        metrics[f"risk/cov_logprob_{name}"] = covariance
        metrics[f"risk/corr_logprob_{name}"] = covariance / spread if spread else 0.0
    return metrics


def _share(chosen: Bool[Tensor, "..."]) -> float:
    """Of all places."""
    return int(chosen.sum()) / chosen.numel()


def _centred(values: Tensor) -> Tensor:
    values = values.to("cpu", torch.float64)
    values = values if values.size(1) > 1 else values.T
    return values - values.mean(dim=1, keepdim=True)
