"""pairing = complete: the average over all combinations of responses, in place of one random permutation.

A response with reward r to question i gets u_i(r) = E[psi(score of r and the others' rewards)], the others' rewards
drawn from their empirical distributions: the expectation of the one-permutation weight given all rewards, hence the
same expected gradient with less noise, and no dependence on the order of responses. Nothing is sampled. Sums of rewards
on a lattice are convolutions, O(B^2) of its points a group. Other rewards are combined one by one where there are few,
and else put on a fine lattice, with the error that Lattice.of states.
"""

import torch
from jaxtyping import Float64, Int64
from torch import Generator, Tensor

from megatron_riskpo.algorithms.bundles import make_groups
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.convolution import means_over_the_others, sum_masses
from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.algorithms.lattice import Lattice
from megatron_riskpo.algorithms.score_blocks import ScoreBlock
from megatron_riskpo.algorithms.subsets import response_subsets

# Numbers that the distributions of some groups may take: 64 MiB in float64.
_MOST_ELEMENTS = 2**23

# Combinations of responses that are worked out one by one, over all groups.
_MOST_COMBINATIONS = 2**21


def complete_blocks(
    rewards: Float64[Tensor, "num_prompts group_size"], config: AlgorithmConfig,
    pass_rates: Float64[Tensor, " num_prompts"] | None, generator: Generator | None,
) -> list[ScoreBlock]:  # fmt: skip
    """One block for each number of questions that a group has; one for all questions with self bundles."""
    if config.bundling == "self":
        return [_own_block(rewards, config.bundle_size)]
    groups = make_groups(rewards.size(0), config, pass_rates, generator)
    lattice = Lattice.of(rewards)
    blocks = []
    for size in groups.sizes.unique().tolist():
        chosen = groups.sizes == size
        members, owned = groups.members[chosen][:, :size], groups.owned[chosen][:, :size]
        if lattice.is_exact or len(members) * rewards.size(1) ** size > _MOST_COMBINATIONS:
            blocks.append(_block(lattice, members, owned, config.bundle_size))
        else:
            blocks.append(_listed_block(rewards, members, owned, config.bundle_size))
    return blocks


def _block(lattice: Lattice, members: Int64[Tensor, "n size"], owned: Tensor, bundle_size: int) -> ScoreBlock:
    """n groups of `size` questions; scores are bundle_size times the mean reward."""
    size, masses = members.size(1), lattice.masses()
    num_points = size * lattice.num_steps + 1
    points = torch.arange(num_points, dtype=torch.float64)
    atoms = bundle_size * lattice.origin + bundle_size / size * lattice.step * points
    chunks = members.split(max(1, _MOST_ELEMENTS // (size * num_points)))
    questions = members[owned]

    def spread(psi: Tensor) -> Tensor:
        pieces = psi.split(len(chunks[0])) if psi.size(0) > 1 else [psi] * len(chunks)
        means = [means_over_the_others(masses[chunk], piece) for chunk, piece in zip(chunks, pieces, strict=True)]
        return lattice.rows(questions).at_rewards(torch.cat(means)[owned])

    total = sum(sum_masses(masses[chunk]).sum(dim=0, keepdim=True) for chunk in chunks)
    return ScoreBlock(
        num_rows=len(members),
        pooled=Distribution.pool([Distribution.of_masses(atoms, total)], [1.0]),
        rows=lambda: Distribution.of_masses(atoms, torch.cat([sum_masses(masses[chunk]) for chunk in chunks])),
        values=atoms[None],
        questions=questions,
        row_of=owned.nonzero()[:, 0],
        spread=spread,
    )


def _listed_block(
    rewards: Float64[Tensor, "num_prompts group_size"], members: Int64[Tensor, "n size"], owned: Tensor,
    bundle_size: int,
) -> ScoreBlock:  # fmt: skip
    """All combinations of the responses of each group; a dimension a question while they are added and averaged."""
    size, shape = members.size(1), (len(members), *[rewards.size(1)] * members.size(1))
    sums = torch.zeros(shape, dtype=torch.float64)
    for place in range(size):
        sums += _along(rewards[members[:, place]], place, size)
    values = (bundle_size / size * sums).flatten(1)

    def spread(psi: Tensor) -> Tensor:
        table = psi.view(shape)
        means = [table.mean(dim=[1 + other for other in range(size) if other != place]) for place in range(size)]
        # Without others to average over, mean(dim=[]) would average over everything.
        return (torch.stack(means, dim=1) if size > 1 else psi[:, None])[owned]

    return ScoreBlock(
        num_rows=len(members),
        pooled=Distribution.of_sample(values.flatten()),
        rows=lambda: Distribution.of_sample(values),
        values=values,
        questions=members[owned],
        row_of=owned.nonzero()[:, 0],
        spread=spread,
    )


def _along(values: Float64[Tensor, "n group_size"], place: int, size: int) -> Tensor:
    """[n, group_size] as [n, 1, ..., group_size, ..., 1], dimension 1 + place of 1 + size."""
    return values.view(len(values), *[1] * place, -1, *[1] * (size - place - 1))


def _own_block(rewards: Float64[Tensor, "num_prompts group_size"], bundle_size: int) -> ScoreBlock:
    """Self bundles: all subsets of bundle_size responses to the question, each with the same probability."""
    subsets = response_subsets(rewards, bundle_size)
    questions = torch.arange(len(rewards))
    return ScoreBlock(
        num_rows=len(rewards),
        pooled=subsets.pooled(),
        rows=subsets.rows,
        values=subsets.values,
        questions=questions,
        row_of=questions,
        spread=subsets.response_weights,
    )
