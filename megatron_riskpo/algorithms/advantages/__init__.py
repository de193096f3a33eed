"""Advantages of all responses of a step, from the reward matrix."""

from dataclasses import dataclass

from jaxtyping import Float, Float64, Int64
from torch import Generator, Tensor

from megatron_riskpo.algorithms.advantages.contract import AdvantageInputs
from megatron_riskpo.algorithms.advantages.registry import ESTIMATORS
from megatron_riskpo.algorithms.advantages.validation import (
    validate_algorithm,
    validated_lengths,
    validated_pass_rates,
    validated_rewards,
)
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.diagnostics import advantage_metrics, reward_metrics, risk_metrics
from megatron_riskpo.algorithms.quantiles import QuantileTracker

__all__ = ["ESTIMATORS", "AdvantageOutputs", "compute_advantages", "validate_algorithm"]


@dataclass(frozen=True)
class AdvantageOutputs:
    """What a step needs to go on."""

    advantages: Float64[Tensor, "num_prompts group_size"]
    """One a response, shared by all its tokens; on the CPU."""
    tracker: QuantileTracker | None
    """Hand it to the next step, and save it with the checkpoint (None unless quantiles are tracked)."""
    metrics: dict[str, float]
    """Keys reward/* and risk/*."""


def compute_advantages(
    rewards: Float[Tensor, "num_prompts group_size"],
    config: AlgorithmConfig,
    *,
    tracker: QuantileTracker | None = None,
    lengths: Int64[Tensor, "num_prompts group_size"] | None = None,
    pass_rates: Float[Tensor, " num_prompts"] | None = None,
    generator: Generator | None = None,
) -> AdvantageOutputs:
    """Advantages of the responses to all questions of a step, over all ranks.

    A pure function of its arguments: ranks that hold the same matrix and equally seeded CPU generators get bit-equal
    advantages (without a generator torch's global one is drawn from). `tracker` is the one of the step before.
    `lengths` are the responses', in tokens. `pass_rates` are running estimates of the questions' mean rewards from
    earlier steps, NaN where there is none yet (bundling = sorted). Raises UsageError for impossible options, shapes and
    rewards.
    """
    rewards = validated_rewards(rewards)
    validate_algorithm(config, *rewards.shape)
    lengths = validated_lengths(lengths, rewards, config)
    pass_rates = validated_pass_rates(pass_rates, rewards, config)
    inputs = AdvantageInputs(rewards, config, tracker, lengths, pass_rates, generator)
    estimate = ESTIMATORS[config.estimator].compute(inputs)
    metrics = reward_metrics(rewards) | risk_metrics(estimate.scores, estimate.quantiles, config)
    metrics |= advantage_metrics(rewards, estimate.advantages)
    return AdvantageOutputs(estimate.advantages, estimate.tracker, metrics)
