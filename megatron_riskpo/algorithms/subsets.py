"""All subsets of k of the n responses to a question: their scores, and what they say of each response."""

import math
from functools import reduce
from itertools import combinations
from typing import Protocol

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.lattice import Lattice

# Float64 numbers held at a time: 64 MiB.
_MOST_ELEMENTS = 2**23

# Steps of the lattice of rewards that have none of their own, where subsets are too many to list.
_CONTINUOUS_STEPS = 128


class Subsets(Protocol):
    """The subsets of every question's responses, each with the same probability."""

    values: Float64[Tensor, "num_prompts_or_1 num_values"]
    """Scores that occur; one row where they are the same for all questions."""

    def pooled(self) -> Distribution:
        """One row: the scores of all questions alike."""
        ...

    def rows(self) -> Distribution:
        """The scores of each question."""
        ...

    def response_weights(self, psi: Tensor) -> Float64[Tensor, "num_prompts group_size"]:
        """psi, of the shape of `values` or with a row a question -> for each response the mean over the subsets that
        contain it."""
        ...


def response_subsets(rewards: Float64[Tensor, "num_prompts group_size"], size: int) -> Subsets:
    """Subsets of `size` responses, 1 <= size <= group_size: listed where that is less work, and exact for any rewards;
    else by dynamic programming, exact for rewards on a lattice (approximate otherwise, see Lattice.of)."""
    num_prompts, group_size = rewards.shape
    num_subsets = math.comb(group_size, size)
    can_list = num_subsets * num_prompts <= _MOST_ELEMENTS
    if can_list and num_subsets <= 4 * size:
        return ListedSubsets(rewards, size)
    lattice = Lattice.of(rewards, _CONTINUOUS_STEPS)
    # A rough count: the dynamic program makes some passes over (taken, sum) for each response.
    if can_list and (not lattice.is_exact or num_subsets <= size * size * lattice.num_steps):
        return ListedSubsets(rewards, size)
    return LatticeSubsets(lattice, size)


class ListedSubsets:
    """One by one."""

    def __init__(self, rewards: Float64[Tensor, "num_prompts group_size"], size: int) -> None:
        group_size = rewards.size(1)
        members = torch.tensor(list(combinations(range(group_size), size)))
        self.values = reduce(torch.add, (rewards[:, members[:, i]] for i in range(size)))
        self._contains = torch.zeros(len(members), group_size, dtype=torch.float64).scatter_(1, members, 1.0)
        self._num_containing = math.comb(group_size - 1, size - 1)

    def pooled(self) -> Distribution:
        return Distribution.of_sample(self.values.flatten())

    def rows(self) -> Distribution:
        return Distribution.of_sample(self.values)

    def response_weights(self, psi: Tensor) -> Tensor:
        return psi @ self._contains / self._num_containing


class LatticeSubsets:
    """By dynamic programming over (number taken, sum): the number of subsets grows as a binomial coefficient, the work
    as group_size * size * points. Questions with the same rewards in another order are one case: with 0/1 rewards there
    are group_size + 1 cases."""

    def __init__(self, lattice: Lattice, size: int) -> None:
        self._size, self._num_points = size, size * lattice.num_steps + 1
        position = lattice.index + lattice.fraction
        self._order = position.argsort(dim=1, stable=True)
        cases, self._case_of = _unique_rows(position.gather(1, self._order), lattice.num_steps + 1)
        self._index = cases.floor().long()
        self._fraction = cases - self._index
        self.values = size * lattice.origin + lattice.step * torch.arange(self._num_points, dtype=torch.float64)[None]
        self._case_masses = torch.cat(
            [self._ways(*part)[-1][:, -1] for part in self._chunks()]
        ) / math.comb(cases.size(1), size)  # fmt: skip

    def pooled(self) -> Distribution:
        counts = torch.bincount(self._case_of, minlength=len(self._index)).double()
        total = Distribution.of_masses(self.values[0], (counts @ self._case_masses)[None])
        return Distribution.pool([total], [1.0])

    def rows(self) -> Distribution:
        return Distribution.of_masses(self.values[0], self._case_masses[self._case_of])

    def response_weights(self, psi: Tensor) -> Tensor:
        num_cases = len(self._index)
        if psi.size(0) > 1:
            # A question's own psi is that of any question with the same rewards.
            questions = torch.arange(len(self._case_of))
            psi = psi[torch.empty(num_cases, dtype=torch.long).scatter_(0, self._case_of, questions)]
        pieces = psi.expand(num_cases, -1).split(self._rows_at_a_time)
        sums = [self._weight_sums(*part, piece) for part, piece in zip(self._chunks(), pieces, strict=True)]
        weights = torch.cat(sums)[self._case_of] / math.comb(self._index.size(1) - 1, self._size - 1)
        return torch.empty_like(weights).scatter_(1, self._order, weights)

    @property
    def _rows_at_a_time(self) -> int:
        return max(1, _MOST_ELEMENTS // ((self._index.size(1) + 1) * (self._size + 1) * self._num_points))

    def _chunks(self) -> list[tuple[Tensor, Tensor]]:
        rows = self._rows_at_a_time
        return list(zip(self._index.split(rows), self._fraction.split(rows), strict=True))

    def _ways(self, index: Int64[Tensor, "n group_size"], fraction: Tensor) -> list[Tensor]:
        """[j][row, k, s]: ways to take k of the first j responses with the sum s."""
        ways = torch.zeros(len(index), self._size + 1, self._num_points, dtype=torch.float64)
        ways[:, 0, 0] = 1
        steps = [ways]
        for j in range(index.size(1)):
            taken = self._shifted(steps[-1][:, :-1], index[:, j], fraction[:, j], direction=-1)
            steps.append(torch.cat([steps[-1][:, :1], steps[-1][:, 1:] + taken], dim=1))
        return steps

    def _weight_sums(self, index: Tensor, fraction: Tensor, psi: Tensor) -> Tensor:
        """For each response the sum of psi over the subsets that contain it: the ways to take from the responses
        before it meet the values of completing the subset from those behind it."""
        ways = self._ways(index, fraction)
        completed = torch.zeros_like(ways[0])
        completed[:, -1] = psi
        sums = torch.empty(index.shape, dtype=torch.float64)
        for j in reversed(range(index.size(1))):
            with_response = self._shifted(completed[:, 1:], index[:, j], fraction[:, j], direction=1)
            sums[:, j] = (ways[j][:, :-1] * with_response).sum(dim=(1, 2))
            completed = torch.cat([completed[:, :-1] + with_response, completed[:, -1:]], dim=1)
        return sums

    def _shifted(self, table: Tensor, index: Tensor, fraction: Tensor, direction: int) -> Tensor:
        """table[row, k, s + direction * reward], 0 beyond its ends; between points interpolated."""
        here = self._moved(table, direction * index)
        if not fraction.any():
            return here
        fraction = fraction[:, None, None]
        return (1 - fraction) * here + fraction * self._moved(table, direction * (index + 1))

    def _moved(self, table: Tensor, offset: Int64[Tensor, " n"]) -> Tensor:
        source = torch.arange(self._num_points) + offset[:, None]
        inside = (source >= 0) & (source < self._num_points)
        source = source.clamp(0, self._num_points - 1)[:, None, :].expand_as(table)
        return table.gather(2, source) * inside[:, None, :]


def _unique_rows(
    positions: Float64[Tensor, "n group_size"], num_points: int
) -> tuple[Float64[Tensor, "num_cases group_size"], Int64[Tensor, " n"]]:
    """The different rows in ascending order, and which of them each row is; 0 <= position < num_points."""
    powers = [num_points**exponent for exponent in reversed(range(positions.size(1)))]
    if num_points * powers[0] > 2**63 or (positions != positions.floor()).any():
        return positions.unique(dim=0, return_inverse=True)
    # Whole positions are the digits of one number a row, which is much faster to sort.
    keys = (positions.long() * torch.tensor(powers)).sum(dim=1)
    cases, case_of = keys.unique(return_inverse=True)
    return (cases[:, None] // torch.tensor(powers) % num_points).double(), case_of
