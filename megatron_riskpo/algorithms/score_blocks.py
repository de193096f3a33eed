"""Scores of groups of questions, and how weights of scores become weights of responses.

A block is what all pairings have in common: where psi is needed, and how to spread it. The risk measure sees the pooled
distribution of all blocks; a per-bundle risk measure sees the row of each group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float64, Int64
from torch import Generator, Tensor

from megatron_riskpo.algorithms.bundles import Bundles, cut_own_responses, make_groups, pair_at_random
from megatron_riskpo.algorithms.config import AlgorithmConfig
from megatron_riskpo.algorithms.distribution import Distribution


@dataclass(frozen=True)
class ScoreBlock:
    """num_rows groups of equally many questions (or, with self bundles, num_rows questions)."""

    num_rows: int
    pooled: Distribution
    """One row: the scores of all groups alike."""
    rows: Callable[[], Distribution]
    """The scores of each group: of its bundles, or of all combinations of its responses. Large, and not always
    needed."""
    values: Callable[[], Float64[Tensor, "num_rows_or_1 num_values"]]
    """Scores at which psi is needed; one row where they are the same for all groups. Large as well."""
    questions: Int64[Tensor, " num_questions"]
    """Questions that get their advantages here."""
    row_of: Int64[Tensor, " num_questions"]
    """The group of each of them."""
    spread: Callable[[Tensor], Tensor]
    """psi [num_rows or 1, num_values] -> weight of each response [num_questions, group_size]."""


def pool(blocks: Sequence[ScoreBlock]) -> Distribution:
    """The distribution of all scores of a step, every group with the same mass."""
    if len(blocks) == 1:
        return blocks[0].pooled
    return Distribution.pool([block.pooled for block in blocks], [block.num_rows for block in blocks])


def sampled_blocks(
    rewards: Float64[Tensor, "num_prompts group_size"], config: AlgorithmConfig,
    pass_rates: Float64[Tensor, " num_prompts"] | None, generator: Generator | None,
) -> list[ScoreBlock]:  # fmt: skip
    """pairing = permutation: each response in one bundle."""
    if config.bundling == "self":
        bundles = cut_own_responses(rewards, config.bundle_size, generator)
    else:
        groups = make_groups(rewards.size(0), config, pass_rates, generator)
        bundles = pair_at_random(rewards, groups, generator)
    return [block_of_bundles(bundles)]


def block_of_bundles(bundles: Bundles) -> ScoreBlock:
    """Each response gets psi of the score of its bundle."""
    scores = bundles.scores
    questions = (bundles.membership[:, 0] >= 0).nonzero()[:, 0]
    membership = bundles.membership.index_select(0, questions)
    return ScoreBlock(
        num_rows=scores.size(0),
        pooled=Distribution.of_sample(scores.flatten()),
        rows=lambda: Distribution.of_sample(scores),
        values=lambda: scores,
        questions=questions,
        row_of=membership[:, 0] // scores.size(1),
        spread=lambda psi: psi.take(membership),
    )
