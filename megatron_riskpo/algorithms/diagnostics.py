"""Metrics of a step's rewards and advantages. All of them are plain floats of the whole batch."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.spectra import cvar, mvar, rvar

NUM_PASS_RATE_BINS = 5


def risk_metrics(
    scores: Float64[Tensor, " num_scores"], quantiles: tuple[float, float], config: AlgorithmConfig
) -> dict[str, float]:
    """The quantiles in use, and the risk measures of the batch's scores at the configured levels."""
    return {
        "risk/q_alpha": quantiles[0],
        "risk/q_beta": quantiles[1],
        "risk/mvar": mvar(scores, config.alpha, config.beta, config.omega),
        "risk/rvar": rvar(scores, config.alpha, config.beta),
        "risk/cvar": cvar(scores, config.alpha),
    }


def reward_metrics(rewards: Float64[Tensor, "num_prompts group_size"]) -> dict[str, float]:
    """Mean reward, and the shares of questions that all or none of their responses solve (solved: reward > 0)."""
    solved = rewards > 0
    return {
        "reward/mean": float(rewards.mean()),
        "reward/solve_all": float(solved.all(dim=1).double().mean()),
        "reward/solve_none": float((~solved).all(dim=1).double().mean()),
    }


def advantage_metrics(
    rewards: Float64[Tensor, "num_prompts group_size"], advantages: Float64[Tensor, "num_prompts group_size"]
) -> dict[str, float]:
    """Share of responses that teach nothing (|A| < 1e-8), and the effective weights by difficulty."""
    zero = {"risk/zero_advantage_share": float((advantages.abs() < 1e-8).double().mean())}
    return zero | effective_weights(rewards, advantages)


def effective_weights(
    rewards: Float64[Tensor, "num_prompts group_size"], advantages: Float64[Tensor, "num_prompts group_size"]
) -> dict[str, float]:
    """How strongly the advantages push questions of each difficulty: `risk/effective_weight/<pass-rate bin>`.

    A question's weight is the regression slope of its advantages on its rewards, the coefficient of its own REINFORCE
    gradient; averaged over the questions of a bin. The pass rate is the share of responses with reward > 0. Questions
    whose rewards are all equal have no slope and bins without questions are left out.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = centred.square().sum(dim=1)
    # By comparison: the centred values of equal rewards need not be exactly 0.
    varied = (rewards != rewards[:, :1]).any(dim=1) & (spread > 0)
    weights = (centred * (advantages - advantages.mean(dim=1, keepdim=True))).sum(dim=1) / spread
    bins = ((rewards > 0).sum(dim=1) * NUM_PASS_RATE_BINS // rewards.shape[1]).clamp(max=NUM_PASS_RATE_BINS - 1)
    metrics = {}
    for index in bins[varied].unique().tolist():
        name = f"{index / NUM_PASS_RATE_BINS:.1f}-{(index + 1) / NUM_PASS_RATE_BINS:.1f}"
        metrics[f"risk/effective_weight/{name}"] = float(weights[varied & (bins == index)].mean())
    return metrics


def cov_logprob_advantage(mean_logprobs: Float[Tensor, " num"], advantages: Float[Tensor, " num"]) -> dict[str, float]:
    """`risk/cov_logprob_advantage`: covariance over the responses of the mean token log-prob with the advantage.

    A policy-gradient step changes the entropy by minus the learning rate times about this (arXiv 2505.22617), so its
    sign says whether the entropy falls.
    """
    logprobs, advantages = mean_logprobs.to("cpu", torch.float64), advantages.to("cpu", torch.float64)
    covariance = ((logprobs - logprobs.mean()) * (advantages - advantages.mean())).mean()
    return {"risk/cov_logprob_advantage": float(covariance)}
