"""What an evaluation needs of the graders, in one place."""

from collections.abc import Sequence
from typing import Any

from torch.distributed import ProcessGroup

from megatron_riskpo.config import RewardConfig
from megatron_riskpo.data.sources import Question
from megatron_riskpo.rewards.answers import final_answer
from megatron_riskpo.rewards.from_config import references_of
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.scoring import Rewards, score_rollouts
from megatron_riskpo.rollout.types import Rollouts

SOLVED_ABOVE = 0.5
"""A response solves its question if its reward is higher."""


def grade(
    rollouts: Rollouts, questions: Sequence[Question], tokenizer: Any, pool: GraderPool, config: RewardConfig,
    world: ProcessGroup,
) -> Rewards:  # fmt: skip
    """Rewards of the responses to `questions`, one question a group. Collective: every rank grades its share."""
    return score_rollouts(rollouts, references_of(questions, config), tokenizer, pool, config, world)


def predicted_answer(response: str, config: RewardConfig) -> str | None:
    """The answer that the response gives, for votes and for people to read; None: it has none."""
    return final_answer(response, config.answer_form)
