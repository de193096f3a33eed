"""What an evaluation needs of the graders, in one place."""

from collections.abc import Sequence
from typing import Any

from torch.distributed import ProcessGroup

from megatron_riskpo.config import RewardConfig
from megatron_riskpo.rewards.answers import final_answer
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.program_text import program_of
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rewards.scoring import Rewards, Scoring
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig, SamplingEngine

SOLVED_ABOVE = 0.5
"""A response solves its question if its reward is higher."""


def sample_and_grade(
    engine: SamplingEngine, prompts: Sequence[Sequence[int]], references: Sequence[Reference], sampling: SamplingConfig,
    seeds: Sequence[int], tokenizer: Any, pool: GraderPool, config: RewardConfig, world: ProcessGroup,
) -> tuple[Rollouts, Rewards]:  # fmt: skip
    """Responses to the prompts and their rewards; each is graded while others are still sampled, where the engine tells
    of it in time. `references`: one a prompt. Collective; raises as Scoring.rewards."""
    scoring = Scoring(tokenizer, pool)

    def grade(row: int, tokens: Sequence[int]) -> None:
        scoring.submit(row, tokens, references[row // sampling.group_size])

    rollouts = engine.generate(prompts, sampling, seeds, grade)
    return rollouts, scoring.rewards(len(prompts), sampling.group_size, config, world)


def predicted_answer(response: str, grader: str, config: RewardConfig) -> str | None:
    """The answer that the response gives, for votes and for people to read: of code the program; None: it has none."""
    return program_of(response) if grader == "code" else final_answer(response, config.answer_form)
