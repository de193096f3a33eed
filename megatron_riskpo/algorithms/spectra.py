"""Distortion risk measures of a sample, and the weights their policy gradients give to a score (arXiv 2510.00911).

All of them are J = integral_0^1 phi(u) F^-1(u) du with F^-1 the quantile function. The integral, not the conditional
expectation E[R | q_a <= R <= q_b], is what stays right where F has atoms, and verifiable rewards are all atoms.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def mvar_weight(scores: Float[Tensor, "*shape"], q_alpha: float, q_beta: float, omega: float) -> Tensor:
    """Weight of each score in the policy gradient of Mixed Value-at-Risk: -(q_beta - S)^+ - omega (q_alpha - S)^+.

    Concave and piecewise linear in S, slopes 1 + omega | 1 | 0, kinks at the quantiles q_alpha and q_beta; at most 0.
    Same shape and unit as `scores`. Theorem 1 of arXiv 2510.00911, terms collected.
    """
    return -(q_beta - scores).clamp(min=0) - omega * (q_alpha - scores).clamp(min=0)


def quantile_integral(sample: Float64[Tensor, " num_scores"], low: float, high: float) -> float:
    """integral_low^high F^-1(u) du of the empirical distribution, 0 <= low <= high <= 1; exact, ties included."""
    num_scores = sample.numel()
    edges = torch.arange(num_scores + 1, dtype=torch.float64) / num_scores
    widths = edges.clamp(low, high).diff()
    return float((sample.sort().values * widths).sum())


def rvar(sample: Float64[Tensor, " num_scores"], low: float, high: float) -> float:
    """Range Value-at-Risk: mean of the quantile function between the levels low < high."""
    return quantile_integral(sample, low, high) / (high - low)


def cvar(sample: Float64[Tensor, " num_scores"], level: float) -> float:
    """Conditional Value-at-Risk of the lower tail: mean of the quantile function below `level` > 0."""
    return rvar(sample, 0.0, level)


def mvar(sample: Float64[Tensor, " num_scores"], alpha: float, beta: float, omega: float) -> float:
    """Mixed Value-at-Risk: (1 + omega) times the integral of F^-1 below alpha, plus the one from alpha to beta.

    Not normalised, as in the paper: its weights integrate to beta + omega * alpha.
    """
    return (1 + omega) * quantile_integral(sample, 0.0, alpha) + quantile_integral(sample, alpha, beta)
