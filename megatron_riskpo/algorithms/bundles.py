"""Bundles: which responses are scored together (arXiv 2510.00911, section on bundling)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Generator, Tensor

from megatron_riskpo.algorithms.config import AlgorithmConfig


@dataclass(frozen=True)
class Bundles:
    """A partition of the responses of a step; every response is in exactly one bundle."""

    membership: Int64[Tensor, "num_prompts group_size"]
    """Bundle of each response, 0 <= id < num_bundles."""
    scores: Float64[Tensor, " num_bundles"]
    """bundle_size times the mean reward of the bundle's responses: the sum of rewards when the bundle is full."""
    siblings: int
    """Responses of one question that share a bundle."""


def make_bundles(
    rewards: Float64[Tensor, "num_prompts group_size"], config: AlgorithmConfig, generator: Generator | None
) -> Bundles:
    """Cut the responses into bundles and score them.

    random: B random questions meet, one response each, by an independent permutation of every question's group. Where
    B does not divide the number of questions, all groups of questions are made as equal as can be (B or a few less;
    a short rest of one question would score all or nothing and distort both tails).
    self: a random permutation of a question's own responses is cut into bundles of B.
    """
    num_prompts, group_size = rewards.shape
    # A random slot 0..G-1 for each response: independent permutations, one a row.
    slots = torch.rand(num_prompts, group_size, dtype=torch.float64, generator=generator).argsort(dim=1, stable=True)
    if config.bundling == "self":
        per_question = group_size // config.bundle_size
        membership = torch.arange(num_prompts)[:, None] * per_question + slots // config.bundle_size
        return Bundles(membership, _scores(rewards, membership, config.bundle_size), config.bundle_size)
    num_groups = -(-num_prompts // config.bundle_size)
    order = torch.randperm(num_prompts, generator=generator)
    membership = (order * num_groups // num_prompts)[:, None] * group_size + slots
    return Bundles(membership, _scores(rewards, membership, config.bundle_size), 1)


def _scores(rewards: Tensor, membership: Tensor, bundle_size: int) -> Tensor:
    # bincount adds in order on the CPU, so that the sums are bit-equal on all ranks.
    sums = torch.bincount(membership.flatten(), weights=rewards.flatten())
    return sums * (bundle_size / torch.bincount(membership.flatten()).double())
