"""GRPO: rewards normalised within the question's group (arXiv 2402.03300)."""

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs, Estimate
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.quantiles import empirical_quantile
from megatron_riskpo.errors import UsageError

_EPS = 1e-6


def grpo(inputs: AdvantageInputs) -> Estimate:
    """A = (r - mean) / (std + 1e-6) over the question's responses.

    The paper leaves open which std; it is the unbiased one (G - 1), as in TRL and verl, so that runs compare.
    """
    rewards, config = inputs.rewards, inputs.config
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # Equal rewards can leave a rounding error, which the division would blow up.
    centred = centred.masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0)
    scores = rewards.flatten()
    quantiles = empirical_quantile(scores, config.alpha), empirical_quantile(scores, config.beta)
    return Estimate(centred / (rewards.std(dim=1, keepdim=True) + _EPS), scores, quantiles, inputs.tracker)


def check_grpo(config: AlgorithmConfig, num_prompts: int, group_size: int) -> None:
    """A group of one has no spread; options of other estimators would silently do nothing."""
    if group_size < 2:
        raise UsageError(
            f"algorithm.estimator = grpo compares the responses of a question, but rollout.group_size = {group_size}: "
            "set it to 2 or more"
        )
    without_effect = (
        ("baseline", config.baseline, "natural"),
        ("scale", config.scale, "none"),
        ("quantile_source", config.quantile_source, "global"),
    )
    for option, value, default in without_effect:
        if value != default:
            raise UsageError(f"algorithm.{option} = {value} has no effect on grpo: leave it out, or use riskpo")
