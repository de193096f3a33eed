"""What the objective is: the typed options of the advantage estimators, of the policy loss and of its corrections."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AlgorithmConfig:
    """Advantage estimation, from a [num_prompts, group_size] reward matrix (arXiv 2510.00911)."""

    estimator: str = "riskpo"
    """Advantage estimator; `--algorithm.estimator list` prints all of them, docs/methods.md has their formulas."""
    spectrum: str = "mvar"
    """Risk measure of riskpo: mean, cvar, rvar, mvar, upper_tail, upper_mvar, max_at_k (`--algorithm.spectrum list`
    prints them), or your own density as FILE.py:function or module:function (docs/risk.md)."""
    alpha: float = 0.2
    """Lower quantile level of the risk measures, 0 < alpha < beta."""
    beta: float = 0.8
    """Upper quantile level of the risk measures, alpha < beta <= 1."""
    omega: float = 0.5
    """Extra weight of the tail below alpha (mvar) or above beta (upper_mvar), >= 0."""
    k: int = 4
    """k of the spectrum max_at_k and of the estimators pkpo and passk."""
    bundle_size: int = 5
    """B: questions a bundle (bundling random, sorted), or responses of one question a bundle (self)."""
    bundling: Literal["random", "sorted", "self"] = "random"
    """Which responses form a bundle: one each of B random questions, of B questions with neighbouring running pass
    rates, or B of the same question."""
    remainder: Literal["balance", "drop", "reuse"] = "balance"
    """Where B does not divide the number of questions. balance: groups as equal as can be, each score B times its mean
    reward; drop: the questions left over get no advantage; reuse: the last group is filled up with other questions."""
    pairing: Literal["permutation", "complete"] = "permutation"
    """How a bundle's responses meet: one random permutation of the group a question, or the exact average over all
    combinations (same expected gradient, less noise)."""
    quantile_source: Literal["global", "tracked", "bundle"] = "global"
    """Quantiles of this step's pooled bundle scores; tracked over steps (moved before use); or of each group of B
    questions alone, as in the released code (for comparison: it weighs easy questions more)."""
    baseline: Literal["natural", "leave_one_out", "mean"] = "natural"
    """Constant taken off the risk weights: none (all advantages <= 0), the question's other responses' mean,
    or the batch mean."""
    scale: Literal["none", "batch_std", "bundle_std"] = "none"
    """Divide the advantages by nothing, by their standard deviation over the batch, or by that of the scores of the
    same group of questions."""
    scale_floor: float = 0.1
    """Least divisor of scale, as a share of the largest |advantage|, > 0."""
    tracker_step: float = 0.1
    """Step of the tracked quantiles, as a share of the range of the bundle scores seen."""
    tracker_decay: float = 0.5
    """The k-th update's step is tracker_step / k**tracker_decay, 0 <= decay <= 1."""
    pass_rate_step: float = 0.5
    """Weight of a question's newest mean reward in its running pass rate (bundling sorted), 0 < step <= 1."""
    quantile_level: float = 0.4
    """K of the estimator qae: its baseline is the K-quantile of the group."""
    risk_temperature: float = 2.0
    """b of the estimator rs_grpo: > 0 seeks risk."""
    pkpo_leave_one_out: bool = True
    """Take the leave-one-out baseline off pkpo's effective rewards."""
    reference_credit: Literal["uniform", "score", "std", "sum_mean"] = "uniform"
    """How riskpo_reference shares a bundle's advantage among its responses."""
    reference_mix_weight: float = 1.5
    """w_mix of riskpo_reference: weight of its lower-tail term beside the middle one."""
    reference_natural_baseline: bool = True
    """Keep the constant q_alpha - q_beta in riskpo_reference's middle term."""


@dataclass(frozen=True)
class PolicyLossConfig:
    """The surrogate that turns advantages into a loss."""

    kind: str = "gspo"
    """Surrogate: gspo (ratio of the whole response, RiskPO's own), ppo (ratio a token), gmpo, cispo, clip_cov, kl_cov
    or reinforce; `--loss.kind list` prints all of them, docs/methods.md has their formulas."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low (gmpo: its logarithm at -clip_low)."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high (gmpo: its logarithm at clip_high)."""
    dual_clip: float = 0.0
    """c > 1: with a negative advantage A the objective is at least c A (ppo, gspo); 0: off."""
    aggregation: Literal["sequence_mean", "token_mean", "sequence_mean_token_sum_norm"] = "sequence_mean"
    """Mean over sequences of their token means; mean over all tokens; or mean over sequences of their token sums over
    the constant rollout.max_response_tokens (Dr. GRPO). All over the GLOBAL mini-batch."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus (nats per token); 0 builds no entropy graph."""
    kl_coefficient: float = 0.0
    """Weight of the KL divergence to the model that the run started from; 0 keeps no copy of it."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of that divergence from one sample, with d = log ref - log pi: -d, d^2 / 2 or exp(d) - d - 1. k1 has no
    gradient on average: kl_in = "reward" only."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Add the divergence to the loss (differentiated), or take its sum over a response off the reward."""
    cov_fraction: float = 2e-4
    """Share of the tokens, those of largest covariance of log-prob and advantage, that clip_cov drops and kl_cov
    penalises."""
    cov_kl_coefficient: float = 1.0
    """Weight of |log ratio| on the tokens that kl_cov penalises."""


@dataclass(frozen=True)
class MismatchConfig:
    """What is done about the difference between the trainer's log-probs and those that the responses were sampled
    with. ratio = pi_old / pi_rollout, a token."""

    correction: Literal["none", "tis", "tis_sequence", "mis", "geometric"] = "none"
    """none; tis: weigh each token by min(ratio, cap); tis_sequence: each response by min(product of ratios, cap); mis:
    weigh tokens by their ratio and mask those outside [1/cap, cap]; geometric: reject responses whose geometric mean
    ratio is outside [1/cap, cap]. All but none cost a forward pass when actor.mini_batches = 1."""
    cap: float = 2.0
    """Bound of the ratios, > 1 (geometric: close to 1, for example 1.01)."""
    abort_above: float = 0.0
    """End the run when the mean |log-prob difference| of a step's tokens exceeds this, in nats; 0: never."""
