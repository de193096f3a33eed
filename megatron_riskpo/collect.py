"""The questions of a step: one draw of the stream, or as many as dynamic sampling takes to fill the step.

Pure of how responses are made: the caller gives a function that draws and grades a group of responses a question.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_riskpo.config import RolloutConfig
from megatron_riskpo.rewards.scoring import Rewards
from megatron_riskpo.rollout.types import Rollouts


@dataclass(frozen=True)
class Groups:
    """Questions with their graded responses; G consecutive rollouts belong to a question."""

    rows: list[int]
    """Question indices, num_prompts of them."""
    rollouts: Rollouts
    rewards: Rewards

    @property
    def lengths(self) -> Tensor:
        """int64 [num_prompts, group_size]: response lengths, in tokens."""
        return self.rollouts.response_lengths.view_as(self.rewards.matrix)

    def select(self, prompts: Sequence[int]) -> "Groups":
        """The given questions (positions in `rows`), in the given order."""
        group_size = self.rewards.matrix.size(1)
        responses = [prompt * group_size + i for prompt in prompts for i in range(group_size)]
        index = torch.as_tensor(prompts, dtype=torch.int64)
        return Groups(
            rows=[self.rows[prompt] for prompt in prompts],
            rollouts=self.rollouts.select(responses),
            rewards=Rewards(self.rewards.matrix[index], self.rewards.errors[index], self.rewards.formatted[index]),
        )

    @classmethod
    def concat(cls, parts: Sequence["Groups"]) -> "Groups":
        """All questions of the parts, in order; at least one part."""
        return cls(
            rows=[row for part in parts for row in part.rows],
            rollouts=Rollouts.concat([part.rollouts for part in parts]),
            rewards=Rewards(
                torch.cat([part.rewards.matrix for part in parts]),
                torch.cat([part.rewards.errors for part in parts]),
                torch.cat([part.rewards.formatted for part in parts]),
            ),
        )


@dataclass(frozen=True)
class Collected:
    """A step's data."""

    batch: Groups
    """What the update trains on: always as many questions as one draw has."""
    drawn: Groups
    """All that was sampled for it: what the policy's rewards are, without the choice."""
    metrics: dict[str, float]
    """rollout/rounds, rollout/kept_share (dynamic sampling only)."""


def collect(draw: Callable[[int], Groups], config: RolloutConfig) -> Collected:
    """The groups that a step trains on. `draw(round)` samples and grades the stream's next questions.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): draws until there are as many groups of unequal rewards as
    one draw has questions, 1 + max_refills draws at most. The first of them make the batch, in the order drawn; a batch
    that is still short is filled with the first groups of equal rewards, so that its shape never changes.
    """
    draws = [draw(0)]
    num_prompts = len(draws[0].rows)
    if not config.dynamic_sampling:
        return Collected(draws[0], draws[0], {})
    differing = rewards_differ(draws[0].rewards)
    while differing.sum() < num_prompts and len(draws) <= config.max_refills:
        draws.append(draw(len(draws)))
        differing = torch.cat([differing, rewards_differ(draws[-1].rewards)])
    drawn = Groups.concat(draws)
    # Stable: among those that differ, and among those that do not, the earlier drawn come first.
    chosen = (~differing).to(torch.int8).argsort(stable=True)[:num_prompts].sort().values
    metrics = {"rollout/rounds": float(len(draws)), "rollout/kept_share": float(differing.double().mean())}
    return Collected(drawn.select(chosen.tolist()), drawn, metrics)


def rewards_differ(rewards: Rewards) -> Tensor:
    """bool [num_prompts]: whether the graded responses of a group have different rewards. Errors say nothing."""
    highest = rewards.matrix.masked_fill(rewards.errors, -torch.inf).amax(dim=1)
    lowest = rewards.matrix.masked_fill(rewards.errors, torch.inf).amin(dim=1)
    return highest > lowest
