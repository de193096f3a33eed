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

# Subsets listed at a time: 16 MiB in each of some temporaries.
_LISTED_AT_A_TIME = 2**21

# Listed scores that the pooled distribution keeps: of more, every second or third ... of the sorted ones. So many of
# continuous rewards are listed even where the dynamic program would be less work, because it is not exact for them.
_MOST_POOLED = 2**23

# What a listed subset costs, beside a (taken, sum) of one response in the dynamic program: measured, roughly.
_SUBSET_WORK = 6

# Steps of the lattice of rewards that have none of their own, where subsets are too many to list.
_CONTINUOUS_STEPS = 128


class Subsets(Protocol):
    """The subsets of every question's responses, each with the same probability."""

    num_prompts: int

    def values(self) -> Float64[Tensor, "num_prompts_or_1 num_values"]:
        """Scores that occur; one row where they are the same for all questions."""
        ...

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


def response_subsets(rewards: Float64[Tensor, "num_prompts group_size"], size: int) -> list[Subsets]:
    """Subsets of `size` responses, 1 <= size <= group_size, of all questions in order, some questions in each item.

    Listed where that is less work, and exact for any rewards; else by dynamic programming, exact for rewards on a
    lattice (approximate otherwise, see Lattice.of). Either costs the same a question, however many there are.
    """
    num_prompts, num_subsets = len(rewards), math.comb(rewards.size(1), size)
    if num_subsets > 4 * size:
        lattice = Lattice.of(rewards, _CONTINUOUS_STEPS)
        if not _listing_is_better(lattice, size, num_subsets):
            return [LatticeSubsets(lattice, size)]
    members = torch.tensor(list(combinations(range(rewards.size(1)), size)))
    thinning = -(-num_prompts * num_subsets // _MOST_POOLED)
    parts = rewards.split(max(1, _LISTED_AT_A_TIME // num_subsets))
    return [ListedSubsets(part, members, thinning) for part in parts]


def _listing_is_better(lattice: Lattice, size: int, num_subsets: int) -> bool:
    num_prompts, group_size = lattice.index.shape
    num_cases, work = num_prompts, group_size * (size + 1) * (size * lattice.num_steps + 1)
    if lattice.is_exact:
        num_points = int((lattice.index.flatten().bincount() > 0).sum())
        # Questions of the same rewards are done once: there are as many cases as multisets of points at most.
        num_cases = min(num_prompts, math.comb(group_size + num_points - 1, group_size))
    elif num_subsets * num_prompts <= _MOST_POOLED:
        return True
    return _SUBSET_WORK * num_subsets * num_prompts <= num_cases * work


class ListedSubsets:
    """One by one, those of a few questions at a time."""

    def __init__(
        self, rewards: Float64[Tensor, "n group_size"], members: Int64[Tensor, "num_subsets size"], thinning: int = 1
    ) -> None:
        self.num_prompts = len(rewards)
        self._rewards, self._members, self._thinning = rewards, members, thinning

    def values(self) -> Tensor:
        return reduce(torch.add, (self._rewards[:, chosen] for chosen in self._members.unbind(1)))

    def pooled(self) -> Distribution:
        return Distribution.of_sample(self.values().flatten()).thinned(self._thinning)

    def rows(self) -> Distribution:
        return Distribution.of_sample(self.values())

    def response_weights(self, psi: Tensor) -> Tensor:
        (num_subsets, size), group_size = self._members.shape, self._rewards.size(1)
        contains = torch.zeros(num_subsets, group_size, dtype=torch.float64).scatter_(1, self._members, 1.0)
        return psi @ contains / (num_subsets * size / group_size)


class LatticeSubsets:
    """By dynamic programming over (number taken, sum): the number of subsets grows as a binomial coefficient, the work
    as group_size * size * points. Questions with the same rewards in another order are one case: with 0/1 rewards there
    are group_size + 1 cases.

    A subset is drawn by walking along the responses: with k of `size` taken among the first j of n, response j is taken
    with probability (size - k) / (n - j). Probabilities, unlike numbers of subsets, fit into a float for any n.
    """

    def __init__(self, lattice: Lattice, size: int) -> None:
        self.num_prompts = len(lattice.index)
        self._size, self._num_points = size, size * lattice.num_steps + 1
        position = lattice.index + lattice.fraction
        self._order = position.argsort(dim=1, stable=True)
        cases, self._case_of = _unique_rows(position.gather(1, self._order), lattice.num_steps + 1)
        self._index = cases.floor().long()
        self._fraction = cases - self._index
        self._points = size * lattice.origin + lattice.step * torch.arange(self._num_points, dtype=torch.float64)
        self._taking, self._leaving = _chances(cases.size(1), size)
        self._case_masses = torch.cat([self._masses(*part)[-1][:, -1] for part in self._chunks()])

    def values(self) -> Tensor:
        return self._points[None]

    def pooled(self) -> Distribution:
        counts = torch.bincount(self._case_of, minlength=len(self._index)).double()
        total = Distribution.of_masses(self._points, (counts @ self._case_masses)[None])
        return Distribution.pool([total], [1.0])

    def rows(self) -> Distribution:
        return Distribution.of_masses(self._points, self._case_masses[self._case_of])

    def response_weights(self, psi: Tensor) -> Tensor:
        num_cases = len(self._index)
        if psi.size(0) > 1:
            # A question's own psi is that of any question with the same rewards.
            questions = torch.arange(len(self._case_of))
            psi = psi[torch.empty(num_cases, dtype=torch.long).scatter_(0, self._case_of, questions)]
        pieces = psi.expand(num_cases, -1).split(self._rows_at_a_time)
        means = [self._means(*part, piece) for part, piece in zip(self._chunks(), pieces, strict=True)]
        weights = torch.cat(means)[self._case_of]
        return torch.empty_like(weights).scatter_(1, self._order, weights)

    @property
    def _rows_at_a_time(self) -> int:
        return max(1, _MOST_ELEMENTS // ((self._index.size(1) + 1) * (self._size + 1) * self._num_points))

    def _chunks(self) -> list[tuple[Tensor, Tensor]]:
        rows = self._rows_at_a_time
        return list(zip(self._index.split(rows), self._fraction.split(rows), strict=True))

    def _masses(self, index: Int64[Tensor, "n group_size"], fraction: Tensor) -> list[Tensor]:
        """[j][row, k, s]: the probability that k of the first j responses are taken, with the sum s."""
        masses = torch.zeros(len(index), self._size + 1, self._num_points, dtype=torch.float64)
        masses[:, 0, 0] = 1
        steps = [masses]
        for j in range(index.size(1)):
            taking, leaving = self._taking[j], self._leaving[j]
            masses = torch.cat([leaving * steps[-1][:, :-1], steps[-1][:, -1:]], dim=1)
            masses[:, 1:] += self._shifted(taking * steps[-1][:, :-1], index[:, j], fraction[:, j], direction=-1)
            steps.append(masses)
        return steps

    def _means(self, index: Tensor, fraction: Tensor, psi: Tensor) -> Tensor:
        """For each response the mean of psi over the subsets that contain it: what was taken before it meets the
        expected psi of what is taken behind it."""
        masses, group_size = self._masses(index, fraction), index.size(1)
        expected = torch.zeros_like(masses[0])
        expected[:, -1] = psi
        means = torch.empty(index.shape, dtype=torch.float64)
        for j in reversed(range(group_size)):
            taking, leaving = self._taking[j], self._leaving[j]
            if_taken = self._shifted(expected[:, 1:], index[:, j], fraction[:, j], direction=1)
            # Of all subsets size / group_size contain the response.
            means[:, j] = (masses[j][:, :-1] * taking * if_taken).sum(dim=(1, 2)) * (group_size / self._size)
            expected = torch.cat([leaving * expected[:, :-1] + taking * if_taken, expected[:, -1:]], dim=1)
        return means

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


def _chances(
    group_size: int, size: int
) -> tuple[Float64[Tensor, "group_size size 1"], Float64[Tensor, "group_size size 1"]]:
    """[j, k]: the probabilities of taking response j and of leaving it where k < size were taken before it."""
    num_left = torch.arange(group_size, 0, -1, dtype=torch.float64)[:, None, None]
    # No k at which more are wanted than are left is ever reached.
    num_wanted = torch.arange(size, 0, -1, dtype=torch.float64)[None, :, None].minimum(num_left)
    return num_wanted / num_left, (num_left - num_wanted) / num_left


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
