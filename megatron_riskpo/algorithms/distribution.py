"""Discrete distributions of scores: of a sample, or of weighted atoms. One row, or one a group of questions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

# A share that is meant to reach a level may come out a rounding error below it (0.1 * 30 = 3.0000000000000004).
LEVEL_ROUNDING = 1e-12


@dataclass(frozen=True)
class Distribution:
    """Atoms and the distribution function at them, row by row; verifiable rewards are all atoms, ties included."""

    atoms: Float64[Tensor, "num_rows num_atoms"]
    """Ascending in each row; equal neighbours are allowed."""
    cdf: Float64[Tensor, "num_rows num_atoms"]
    """F at each atom counted up to and including it in this order; the last is 1."""

    @classmethod
    def of_sample(cls, scores: Float64[Tensor, "*rows num_scores"]) -> "Distribution":
        """The empirical distribution of each row (a vector is one row)."""
        atoms = torch.atleast_2d(scores).sort(dim=1).values
        num_scores = atoms.size(1)
        shares = torch.arange(1, num_scores + 1, dtype=torch.float64) / num_scores
        return cls(atoms, shares.expand_as(atoms))

    @classmethod
    def of_masses(
        cls, atoms: Float64[Tensor, " num_atoms"], masses: Float64[Tensor, "num_rows num_atoms"]
    ) -> "Distribution":
        """From ascending atoms, the same for all rows, and their masses (any positive total)."""
        sums = masses.cumsum(dim=1)
        return cls(atoms.expand_as(masses), sums / sums[:, -1:])

    @classmethod
    def pool(cls, parts: Sequence["Distribution"], weights: Sequence[float]) -> "Distribution":
        """One row: the mixture of one-row distributions, atoms without mass left out."""
        atoms = torch.cat([part.atoms[0] for part in parts])
        masses = torch.cat([weight * part.masses[0] for part, weight in zip(parts, weights, strict=True)])
        present = masses > 0
        atoms, order = atoms[present].sort(stable=True)
        return cls.of_masses(atoms, masses[present][order][None])

    def thinned(self, every: int) -> "Distribution":
        """Every so many atoms, the largest among them; F at them is as it was, so that a quantile is one of the next
        `every` atoms at most."""
        kept = torch.arange((self.atoms.size(1) - 1) % every, self.atoms.size(1), every)
        return Distribution(self.atoms[:, kept], self.cdf[:, kept]) if every > 1 else self

    @property
    def num_rows(self) -> int:
        return self.atoms.size(0)

    @property
    def masses(self) -> Float64[Tensor, "num_rows num_atoms"]:
        """Probability of each atom."""
        return self.cdf.diff(dim=1, prepend=torch.zeros(self.num_rows, 1, dtype=torch.float64))

    def quantiles(self, level: float) -> Float64[Tensor, " num_rows"]:
        """inf{x : F(x) >= level} of each row, 0 < level <= 1: always one of the atoms."""
        least = torch.full((self.num_rows, 1), level * (1 - LEVEL_ROUNDING), dtype=torch.float64)
        index = torch.searchsorted(self.cdf.contiguous(), least).clamp(max=self.atoms.size(1) - 1)
        return self.atoms.gather(1, index)[:, 0]

    def quantile(self, level: float) -> float:
        """`quantiles` of the one row."""
        return float(self.quantiles(level))

    def share_below(self, value: float) -> float:
        """P(S < value) of the one row."""
        below = int(torch.searchsorted(self.atoms[0].contiguous(), value))
        return float(self.cdf[0, below - 1]) if below else 0.0

    def support(self) -> tuple[float, float]:
        """Smallest and largest atom with mass of the one row."""
        present = self.atoms[0][self.masses[0] > 0]
        return float(present.min()), float(present.max())

    def std(self) -> Float64[Tensor, " num_rows"]:
        """Standard deviation of each row (of the distribution: no n - 1)."""
        mean = (self.masses * self.atoms).sum(dim=1, keepdim=True)
        return (self.masses * (self.atoms - mean).square()).sum(dim=1).sqrt()
