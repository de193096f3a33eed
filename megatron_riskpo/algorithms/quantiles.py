"""Quantiles of the pooled scores: of one batch, or tracked over steps by stochastic approximation."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from jaxtyping import Float64
from torch import Tensor

from megatron_riskpo.errors import UsageError

# u * n of a whole number may come out a rounding error above it (0.1 * 30 = 3.0000000000000004).
_ROUNDING = 1e-12


def empirical_quantile(sample: Float64[Tensor, " num_scores"], level: float) -> float:
    """inf{x : F(x) >= level} of the empirical distribution, 0 < level <= 1: always one of the scores."""
    rank = math.ceil(level * sample.numel() * (1 - _ROUNDING))
    return float(sample.kthvalue(max(rank, 1)).values)


@dataclass(frozen=True)
class QuantileTracker:
    """Quantiles that follow a moving distribution of scores, on a slower time scale than the policy.

    q <- q + gamma_k (u - mean 1{S < q}) for each level u, gamma_k = step * (range of the scores seen) / k**decay
    (arXiv 2510.00911). Immutable: `update` gives the next tracker. Start one with `QuantileTracker.start`.
    """

    levels: tuple[float, ...]
    """The levels u, ascending."""
    values: tuple[float, ...]
    """The tracked quantiles q, one a level, ascending, in the unit of the scores."""
    score_min: float
    """Smallest score seen."""
    score_max: float
    """Largest score seen."""
    num_updates: int = 0
    """k: updates made since the start."""

    @classmethod
    def start(cls, scores: Float64[Tensor, " num_scores"], levels: Sequence[float]) -> "QuantileTracker":
        """At the empirical quantiles of a first batch."""
        values = tuple(empirical_quantile(scores, level) for level in levels)
        return cls(tuple(levels), values, float(scores.min()), float(scores.max()))

    def update(self, scores: Float64[Tensor, " num_scores"], step: float, decay: float) -> "QuantileTracker":
        """Move once by a batch of scores."""
        num_updates = self.num_updates + 1
        low, high = min(self.score_min, float(scores.min())), max(self.score_max, float(scores.max()))
        gamma = step * (high - low) / num_updates**decay
        moved = []
        for level, value in zip(self.levels, self.values, strict=True):
            below = int((scores < value).sum()) / scores.numel()
            moved.append(min(max(value + gamma * (level - below), low), high))
        # Separate recursions can cross. Sorting them back never adds error (Chernozhukov et al. 2010, "Quantile and
        # probability curves without crossing").
        return QuantileTracker(self.levels, tuple(sorted(moved)), low, high, num_updates)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers: survives JSON bit for bit."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "QuantileTracker":
        """The inverse of `state_dict`. Raises UsageError where the keys are not a tracker's."""
        expected = {item.name for item in fields(cls)}
        if set(state) != expected:
            raise UsageError(
                f"the quantile tracker's saved state has the keys {sorted(state)}, not {sorted(expected)}: "
                "resume from a checkpoint of this version"
            )
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in state.items()})
