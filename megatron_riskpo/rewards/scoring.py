"""From rollouts to the reward matrix that every rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.errors import RunError
from megatron_riskpo.rewards.answers import boxed_or_nothing
from megatron_riskpo.rewards.pool import GraderPool, fill_errors
from megatron_riskpo.rollout.types import Rollouts


@dataclass(frozen=True)
class Rewards:
    """The graded responses of a batch; the same on every rank."""

    matrix: Tensor
    """float64 [num_prompts, group_size]; an error stands in as the mean of its group's other rewards."""
    errors: Tensor
    """bool [num_prompts, group_size]: the grader failed or ran out of time."""


def score_rollouts(
    rollouts: Rollouts, answers: Sequence[str], tokenizer: Any, pool: GraderPool, answer_form: str, world: ProcessGroup
) -> Rewards:
    """Grade all responses: every rank grades its share, one all-reduce joins them.

    `answers`: the expected answer of each prompt; its group of responses are consecutive rows. answer_form: see
    RewardConfig. Raises RunError on every rank if not one response could be graded.
    """
    num_rows = rollouts.num_sequences
    group_size = num_rows // len(answers)
    mine = range(world.rank(), num_rows, world.size())
    responses = rollouts.responses()
    texts = tokenizer.batch_decode([responses[row] for row in mine], skip_special_tokens=True)
    if answer_form == "boxed":
        texts = [boxed_or_nothing(text) for text in texts]
    grades = pool.score(texts, [answers[row // group_size] for row in mine])
    flat = torch.zeros(num_rows, dtype=torch.float64)
    flat[list(mine)] = torch.tensor([grade.score for grade in grades], dtype=torch.float64)
    dist.all_reduce(flat, group=world)  # every row has one grader, the others add 0; an error is NaN and stays so
    errors = flat.isnan()
    if errors.all() and num_rows > 1:
        example = next((grade.error for grade in grades if grade.error is not None), "on another rank")
        raise RunError(f"the grader failed on all {num_rows} responses of the batch, for example: {example}")
    return Rewards(fill_errors(flat.view(len(answers), group_size)), errors.view(len(answers), group_size))
