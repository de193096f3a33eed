"""What the objective is: the typed options of the advantage estimators and of the policy loss."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AlgorithmConfig:
    """Advantage estimation, from a [num_prompts, group_size] reward matrix (arXiv 2510.00911)."""

    estimator: str = "riskpo"
    """Advantage estimator: riskpo (Mixed Value-at-Risk of bundle scores) or grpo (group-normalised mean)."""
    alpha: float = 0.2
    """Lower quantile level of MVaR, 0 < alpha < beta."""
    beta: float = 0.8
    """Upper quantile level of MVaR, alpha < beta <= 1."""
    omega: float = 0.5
    """Extra weight of the tail below alpha, >= 0 (0: RVaR of everything below beta)."""
    bundle_size: int = 5
    """B: questions a bundle (bundling = random), or responses of one question a bundle (bundling = self)."""
    bundling: Literal["random", "self"] = "random"
    """Which responses form a bundle: one each of B random questions, or B of the same question."""
    pairing: Literal["permutation"] = "permutation"
    """How a bundle's responses meet: one independent random permutation of the group a question."""
    quantile_source: Literal["global", "tracked"] = "global"
    """Quantiles of this step's pooled bundle scores, or quantiles tracked over steps (moved before use)."""
    baseline: Literal["natural", "leave_one_out", "mean"] = "natural"
    """Constant taken off the risk weights: none (all advantages <= 0), the question's other responses' mean,
    or the batch mean."""
    scale: Literal["none", "batch_std"] = "none"
    """Divide the advantages by nothing, or by their standard deviation over the batch."""
    tracker_step: float = 0.1
    """Step of the tracked quantiles, as a share of the range of the bundle scores seen."""
    tracker_decay: float = 0.5
    """The k-th update's step is tracker_step / k**tracker_decay, 0 <= decay <= 1."""


@dataclass(frozen=True)
class PolicyLossConfig:
    """The clipped surrogate that turns advantages into a loss."""

    ratio: Literal["sequence", "token"] = "sequence"
    """Importance ratio: (pi/pi_old)^(1/|y|) of the whole response (RiskPO, GSPO) or per token (PPO, GRPO)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """Mean over sequences of their token means, or mean over all tokens; both over the GLOBAL mini-batch."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus (nats per token); 0 builds no entropy graph."""
