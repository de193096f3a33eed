"""What an advantage estimator takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float64, Int64
from torch import Generator, Tensor

from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.quantiles import QuantileTracker


@dataclass(frozen=True)
class AdvantageInputs:
    """One step's rewards, of all questions of all ranks."""

    rewards: Float64[Tensor, "num_prompts group_size"]
    config: AlgorithmConfig
    tracker: QuantileTracker | None = None
    lengths: Int64[Tensor, "num_prompts group_size"] | None = None
    """Response lengths, in tokens."""
    pass_rates: Float64[Tensor, " num_prompts"] | None = None
    """Running estimate of each question's mean reward from EARLIER steps; NaN where there is none yet."""
    generator: Generator | None = None


@dataclass(frozen=True)
class Estimate:
    """What an estimator found."""

    advantages: Float64[Tensor, "num_prompts group_size"]
    scores: Distribution
    """Whose risk is reported: one row, the pooled scores of the bundles, or the rewards where there are none."""
    quantiles: tuple[float, float]
    """q_alpha and q_beta of the scores, as used."""
    tracker: QuantileTracker | None = None


@dataclass(frozen=True)
class Estimator:
    """An entry of the registry."""

    description: str
    """One line, for the user."""
    compute: Callable[[AdvantageInputs], Estimate]
    options: frozenset[str] = frozenset()
    """Fields of AlgorithmConfig that this estimator reads; setting another one is refused (alpha, beta and omega are
    read by the metrics of all estimators)."""
    least_group_size: int = 1
    """Responses a question that it needs at least."""
    needs_lengths: bool = False
    check: Callable[[AlgorithmConfig, int, int], None] | None = None
    """(config, num_prompts, group_size): raises UsageError for what this estimator cannot do."""


def pointwise(compute: Callable[[AdvantageInputs], Tensor]) -> Callable[[AdvantageInputs], Estimate]:
    """An estimator without bundles, from a function that gives the advantages: the risk reported is the rewards'."""

    def estimate(inputs: AdvantageInputs) -> Estimate:
        scores = Distribution.of_sample(inputs.rewards.flatten())
        quantiles = (scores.quantile(inputs.config.alpha), scores.quantile(inputs.config.beta))
        return Estimate(compute(inputs), scores, quantiles, inputs.tracker)

    return estimate
