"""RiskPO: every response gets the risk weight of its bundle's score (arXiv 2510.00911)."""

from torch import Tensor

from megatron_riskpo.algorithms.advantages.baselines import scale_advantages, subtract_baseline
from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs, Estimate
from megatron_riskpo.algorithms.bundles import make_bundles
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.quantiles import QuantileTracker, empirical_quantile
from megatron_riskpo.algorithms.spectra import mvar_weight
from megatron_riskpo.errors import UsageError


def riskpo(inputs: AdvantageInputs) -> Estimate:
    """A = psi(S) of the response's bundle, psi the gradient weight of Mixed Value-at-Risk at q_alpha and q_beta."""
    config = inputs.config
    bundles = make_bundles(inputs.rewards, config, inputs.generator)
    (q_alpha, q_beta), tracker = score_quantiles(bundles.scores, config, inputs.tracker)
    weights = mvar_weight(bundles.scores, q_alpha, q_beta, config.omega)[bundles.membership]
    centred = subtract_baseline(weights, config.baseline, bundles.siblings)
    advantages = scale_advantages(centred, config.scale, largest_score=float(bundles.scores.abs().max()))
    return Estimate(advantages, bundles.scores, (q_alpha, q_beta), tracker)


def score_quantiles(
    scores: Tensor, config: AlgorithmConfig, tracker: QuantileTracker | None
) -> tuple[tuple[float, float], QuantileTracker | None]:
    """(q_alpha, q_beta) of the pooled scores, and the tracker for the next step. A tracker moves before its use."""
    levels = (config.alpha, config.beta)
    if config.quantile_source == "global":
        return (empirical_quantile(scores, levels[0]), empirical_quantile(scores, levels[1])), tracker
    if tracker is None:
        tracker = QuantileTracker.start(scores, levels)
    elif tracker.levels != levels:
        raise UsageError(
            f"the quantile tracker follows the levels {tracker.levels}, the configuration asks for {levels}: "
            "set algorithm.alpha and algorithm.beta back, or start a new run"
        )
    else:
        tracker = tracker.update(scores, config.tracker_step, config.tracker_decay)
    return (tracker.values[0], tracker.values[1]), tracker


def check_riskpo(config: AlgorithmConfig, num_prompts: int, group_size: int) -> None:
    """Bundles that cannot be made, and baselines that have nothing to be made of."""
    if config.bundling == "random" and config.bundle_size > num_prompts:
        raise UsageError(
            f"algorithm.bundle_size = {config.bundle_size} random questions a bundle, but a step has {num_prompts}: "
            "lower it, or raise data.prompts_per_step"
        )
    if config.bundling == "self" and group_size % config.bundle_size:
        raise UsageError(
            f"algorithm.bundling = self cuts the {group_size} responses of a question into bundles of "
            f"{config.bundle_size}, which does not divide: set algorithm.bundle_size to a divisor of rollout.group_size"
        )
    siblings = config.bundle_size if config.bundling == "self" else 1
    if config.baseline == "leave_one_out" and group_size <= siblings:
        raise UsageError(
            f"algorithm.baseline = leave_one_out needs responses of the question in other bundles, but all "
            f"{group_size} are in one: raise rollout.group_size above {siblings}, or choose natural or mean"
        )
