"""Rewards as whole steps on a lattice, so that the distributions of their sums can be convolved."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

MOST_STEPS = 256
"""Rewards that need more steps than this are taken as continuous: see `Lattice.of`."""

# Shares of a step: rewards such as 0.1 + 0.2 are not exactly where they are meant to be.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Lattice:
    """reward = origin + step * (index + fraction)."""

    origin: float
    step: float
    num_steps: int
    """The largest index; a fraction never reaches beyond it."""
    index: Int64[Tensor, "num_prompts group_size"]
    fraction: Float64[Tensor, "num_prompts group_size"]
    """0 <= fraction < 1. All 0 where the rewards lie on the lattice; else a reward stands for index with probability
    1 - fraction and for index + 1 with probability fraction, which keeps its mean."""

    @classmethod
    def of(cls, rewards: Float64[Tensor, "num_prompts group_size"], most_steps: int = MOST_STEPS) -> "Lattice":
        """The coarsest lattice that holds all rewards; without one of at most `most_steps` steps, that many.

        In the latter case a bundle's score moves by less than h B, h = range / most_steps, and keeps its mean: the
        quantiles of the scores are off by at most h B, and averages of psi by at most
        (sum of |heights of the spectrum's steps| + sup phi / 2) h B.
        """
        distinct = rewards.unique()
        origin, spread = float(distinct[0]), float(distinct[-1] - distinct[0])
        num_steps = _steps_needed((distinct[1:] - origin).tolist(), spread, most_steps)
        step = spread / num_steps if spread else 1.0
        position = (rewards - origin) / step
        nearest = position.round()
        on_lattice = (position - nearest).abs() <= _ROUNDING * max(1, num_steps)
        index = torch.where(on_lattice, nearest, position.floor()).clamp(0, num_steps).long()
        fraction = torch.where(on_lattice, 0.0, position - index).clamp(0, 1)
        return cls(origin, step, num_steps, index, fraction)

    @property
    def is_exact(self) -> bool:
        """All rewards lie on the lattice."""
        return not self.fraction.any()

    def masses(self) -> Float64[Tensor, "num_prompts num_points"]:
        """The empirical distribution of each question's rewards over the num_steps + 1 points."""
        num_prompts, group_size = self.index.shape
        masses = torch.zeros(num_prompts, self.num_steps + 2, dtype=torch.float64)
        masses.scatter_add_(1, self.index, (1 - self.fraction) / group_size)
        masses.scatter_add_(1, self.index + 1, self.fraction / group_size)
        return masses[:, :-1]

    def rows(self, chosen: Int64[Tensor, " n"]) -> "Lattice":
        """Of the given questions."""
        return Lattice(self.origin, self.step, self.num_steps, self.index[chosen], self.fraction[chosen])

    def at_rewards(
        self, values: Float64[Tensor, "num_prompts num_points"]
    ) -> Float64[Tensor, "num_prompts group_size"]:
        """Values of the points, a row a question, interpolated at the question's rewards."""
        here = values.gather(1, self.index)
        if self.is_exact:
            return here
        above = values.gather(1, (self.index + 1).clamp(max=self.num_steps))
        return here + self.fraction * (above - here)


def _steps_needed(offsets: list[float], spread: float, most_steps: int) -> int:
    """Steps of the coarsest lattice that holds 0 and all offsets, the largest of which is `spread`; most_steps at
    most."""
    step = 0.0
    for offset in offsets:
        step = _common_divisor(offset, step, _ROUNDING * spread)
        if step * (most_steps + 0.5) < spread:
            return most_steps
    return max(1, round(spread / step)) if step else 1


def _common_divisor(a: float, b: float, tolerance: float) -> float:
    """The largest number of which a and b are multiples, within the tolerance (Euclid)."""
    while b > tolerance:
        remainder = math.fmod(a, b)
        # A multiple of b may come out a little below the next multiple.
        a, b = b, 0.0 if b - remainder <= tolerance else remainder
    return a
