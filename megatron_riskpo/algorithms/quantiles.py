"""Quantiles of the scores that follow a moving distribution over steps, by stochastic approximation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.errors import UsageError


@dataclass(frozen=True)
class QuantileTracker:
    """Quantiles that follow a moving distribution of scores, on a slower time scale than the policy.

    q <- q + gamma_k (u - P(S < q)) for each level u, gamma_k = step * (range of the scores seen) / k**decay
    (arXiv 2510.00911). Immutable: `update` gives the next tracker. Start one with `QuantileTracker.start`.
    """

    levels: tuple[float, ...]
    """The levels u, ascending, each below 1."""
    values: tuple[float, ...]
    """The tracked quantiles q, one a level, ascending, in the unit of the scores."""
    score_min: float
    """Smallest score seen."""
    score_max: float
    """Largest score seen: the quantile of level 1."""
    num_updates: int = 0
    """k: updates made since the start."""

    @classmethod
    def start(cls, scores: Distribution, levels: Sequence[float]) -> "QuantileTracker":
        """At the quantiles of a first batch; `scores` has one row."""
        return cls(tuple(levels), tuple(scores.quantile(level) for level in levels), *scores.support())

    def update(self, scores: Distribution, step: float, decay: float) -> "QuantileTracker":
        """Move once by a batch of scores (one row)."""
        num_updates = self.num_updates + 1
        low, high = scores.support()
        low, high = min(self.score_min, low), max(self.score_max, high)
        gamma = step * (high - low) / num_updates**decay
        moved = [
            min(max(value + gamma * (level - scores.share_below(value)), low), high)
            for level, value in zip(self.levels, self.values, strict=True)
        ]
        # Separate recursions can cross. Sorting them back never adds error (Chernozhukov et al. 2010, "Quantile and
        # probability curves without crossing").
        return QuantileTracker(self.levels, tuple(sorted(moved)), low, high, num_updates)

    def quantile(self, level: float) -> float:
        """The tracked quantile of one of the levels, or of level 1."""
        return self.score_max if level == 1 else self.values[self.levels.index(level)]

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
