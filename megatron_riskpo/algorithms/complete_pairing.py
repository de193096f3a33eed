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
    """One block for each number of questions that a group has; with self bundles one for some questions at a time."""
    if config.bundling == "self":
        return _own_blocks(rewards, config.bundle_size)
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
        values=lambda: atoms[None],
        questions=questions,
        row_of=owned.nonzero()[:, 0],
        spread=spread,
    )


def _listed_block(
    rewards: Float64[Tensor, "num_prompts group_size"], members: Int64[Tensor, "n size"], owned: Tensor,
    bundle_size: int,
) -> ScoreBlock:  # fmt: skip
    """All combinations of the responses of each group, those that differ in the last question's response only side by
    side."""
    (num_groups, size), group_size = members.shape, rewards.size(1)
    sums = torch.zeros(num_groups, 1, dtype=torch.float64)
    for place in range(size):
        sums = (sums[:, :, None] + rewards[members[:, place], None, :]).flatten(1)
    values = bundle_size / size * sums

    def spread(psi: Tensor) -> Tensor:
        # Combinations by (responses to the questions before, to this one, to those behind it).
        tables = (psi.view(num_groups, group_size**place, group_size, -1) for place in range(size))
        return torch.stack([table.mean(dim=(1, 3)) for table in tables], dim=1)[owned]

    return ScoreBlock(
        num_rows=num_groups,
        pooled=Distribution.of_sample(values.flatten()),
        rows=lambda: Distribution.of_sample(values),
        values=lambda: values,
        questions=members[owned],
        row_of=owned.nonzero()[:, 0],
        spread=spread,
    )


def _own_blocks(rewards: Float64[Tensor, "num_prompts group_size"], bundle_size: int) -> list[ScoreBlock]:
    """Self bundles: all subsets of bundle_size responses to the question, each with the same probability."""
    parts = response_subsets(rewards, bundle_size)
    questions = torch.arange(len(rewards)).split([part.num_prompts for part in parts])
    return [
        ScoreBlock(
            num_rows=part.num_prompts,
            pooled=part.pooled(),
            rows=part.rows,
            values=part.values,
            questions=chosen,
            row_of=torch.arange(part.num_prompts),
            spread=part.response_weights,
        )
        for part, chosen in zip(parts, questions, strict=True)
    ]
