"""Which questions form a group, and how the responses of a group meet in bundles (arXiv 2510.00911)."""

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Generator, Tensor

from megatron_riskpo.algorithms.config import AlgorithmConfig


@dataclass(frozen=True)
class QuestionGroups:
    """Groups of questions; a bundle holds one response to each question of its group."""

    members: Int64[Tensor, "num_groups bundle_size"]
    """Questions of each group; -1 fills up a smaller group."""
    owned: Bool[Tensor, "num_groups bundle_size"]
    """The question's advantages come from this place: every question has one such place at most."""

    @property
    def sizes(self) -> Int64[Tensor, " num_groups"]:
        """Questions of each group."""
        return (self.members >= 0).sum(dim=1)


def make_groups(
    num_prompts: int, config: AlgorithmConfig, pass_rates: Float64[Tensor, " num_prompts"] | None,
    generator: Generator | None,
) -> QuestionGroups:  # fmt: skip
    """Groups of config.bundle_size questions, at random or of neighbouring pass rates (ties and questions without a
    pass rate at random, the latter in the middle). config.remainder says what becomes of a rest."""
    size = config.bundle_size
    order = torch.randperm(num_prompts, generator=generator)
    if config.bundling == "sorted" and pass_rates is not None:
        middle = pass_rates.nanmedian().nan_to_num(0.0)
        order = order[torch.where(pass_rates.isnan(), middle, pass_rates)[order].argsort(stable=True)]
    num_groups = num_prompts // size if config.remainder == "drop" else -(-num_prompts // size)
    members = torch.full((num_groups, size), -1)
    if config.remainder == "balance":
        group = torch.arange(num_prompts) * num_groups // num_prompts
        first = torch.searchsorted(group, torch.arange(num_groups))
        members[group, torch.arange(num_prompts) - first[group]] = order
        return QuestionGroups(members, members >= 0)
    num_whole = num_prompts // size
    members[:num_whole] = order[: num_whole * size].view(num_whole, size)
    owned = torch.ones_like(members, dtype=torch.bool)
    if num_groups > num_whole:
        # The rest and its neighbours in the order, which keep the advantages of their own group.
        members[-1] = order[-size:]
        owned[-1, : num_groups * size - num_prompts] = False
    return QuestionGroups(members, owned)


@dataclass(frozen=True)
class Bundles:
    """One response of each question of a group in each bundle, every response in one bundle of its own group."""

    membership: Int64[Tensor, "num_prompts group_size"]
    """Place of each response's bundle in the flat scores; -1 for questions that were dropped."""
    scores: Float64[Tensor, "num_groups num_bundles"]
    """bundle_size times the mean reward of the bundle's responses: the sum of rewards when the bundle is full."""


def pair_at_random(
    rewards: Float64[Tensor, "num_prompts group_size"], groups: QuestionGroups, generator: Generator | None
) -> Bundles:
    """group_size bundles a group, by an independent random permutation of the responses to each question."""
    num_groups, size = groups.members.shape
    group_size = rewards.size(1)
    slots = _random_order((num_groups, size, group_size), generator)
    present = groups.members >= 0
    rows = rewards[groups.members.clamp(min=0)] * present[:, :, None]
    # One addition after the other, so that the sums are bit-equal on all ranks.
    sums = reduce(torch.add, rows.gather(2, slots).unbind(1))
    scores = sums * (size / present.sum(dim=1, keepdim=True).double())
    return Bundles(_membership(rewards.size(0), groups, slots), scores)


def _membership(
    num_prompts: int, groups: QuestionGroups, slots: Int64[Tensor, "num_groups bundle_size group_size"]
) -> Int64[Tensor, "num_prompts group_size"]:
    """slots: the response that each bundle of a group holds of each of its questions."""
    num_groups, _, group_size = slots.shape
    bundle_ids = torch.arange(num_groups * group_size).view(num_groups, 1, group_size).expand_as(slots)
    # Places not owned write into a row more. Flat indices take a third of the time that rows and columns take.
    questions = torch.where(groups.owned, groups.members, num_prompts)
    places = questions[:, :, None] * group_size + slots
    membership = torch.full(((num_prompts + 1) * group_size,), -1)
    membership.scatter_(0, places.flatten(), bundle_ids.flatten())
    return membership.view(num_prompts + 1, group_size)[:-1]


def cut_own_responses(
    rewards: Float64[Tensor, "num_prompts group_size"], bundle_size: int, generator: Generator | None
) -> Bundles:
    """Bundles of bundle_size responses to the same question: each group of responses is shuffled and cut."""
    num_prompts, group_size = rewards.shape
    num_bundles = group_size // bundle_size
    order = _random_order((num_prompts, group_size), generator)
    pieces = rewards.gather(1, order).view(num_prompts, num_bundles, bundle_size)
    scores = reduce(torch.add, pieces.unbind(2))
    bundle_ids = torch.arange(num_prompts * num_bundles).view(num_prompts, num_bundles, 1)
    membership = torch.empty_like(order)
    membership.scatter_(1, order, bundle_ids.expand(-1, -1, bundle_size).reshape(num_prompts, group_size))
    return Bundles(membership, scores)


def _random_order(shape: tuple[int, ...], generator: Generator | None) -> Int64[Tensor, "*shape"]:
    """Independent random permutations along the last dimension."""
    # Not stable, which takes half the time: 8,192 rows of 5 numbers hold two equal ones once in 1e11 steps.
    return torch.rand(shape, dtype=torch.float64, generator=generator).argsort(dim=-1)
