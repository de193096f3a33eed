"""What an advantage estimator takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float64, Int64
from torch import Generator, Tensor

from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.quantiles import QuantileTracker


@dataclass(frozen=True)
class AdvantageInputs:
    """One step's rewards, of all questions of all ranks."""

    rewards: Float64[Tensor, "num_prompts group_size"]
    config: AlgorithmConfig
    tracker: QuantileTracker | None
    lengths: Int64[Tensor, "num_prompts group_size"] | None
    """Response lengths, in tokens."""
    generator: Generator | None


@dataclass(frozen=True)
class Estimate:
    """What an estimator found."""

    advantages: Float64[Tensor, "num_prompts group_size"]
    scores: Float64[Tensor, " num_scores"]
    """The scores whose risk is reported: of the bundles, or the rewards where there are none."""
    quantiles: tuple[float, float]
    """q_alpha and q_beta of the scores, as used."""
    tracker: QuantileTracker | None


@dataclass(frozen=True)
class Estimator:
    """An entry of the registry."""

    description: str
    """One line, for the user."""
    compute: Callable[[AdvantageInputs], Estimate]
    check: Callable[[AlgorithmConfig, int, int], None]
    """(config, num_prompts, group_size): raises UsageError for what this estimator cannot do."""
