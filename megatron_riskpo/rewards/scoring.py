"""From rollouts to the reward matrix that every rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.config import RewardConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.rewards.answers import has_form
from megatron_riskpo.rewards.pool import Grade, GraderPool, fill_errors
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rollout.types import Rollouts

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Rewards:
    """The graded responses of a batch; the same on every rank."""

    matrix: Tensor
    """float64 [num_prompts, group_size]; an error stands in as the mean of its group's other rewards."""
    errors: Tensor
    """bool [num_prompts, group_size]: the grader failed or ran out of time."""
    formatted: Tensor
    """bool [num_prompts, group_size]: the response has the answer form (all, where any will do)."""


def score_rollouts(
    rollouts: Rollouts, references: Sequence[Reference], tokenizer: Any, pool: GraderPool, config: RewardConfig,
    world: ProcessGroup,
) -> Rewards:  # fmt: skip
    """Grade all responses: every rank grades its share, one all-reduce joins them.

    `references`: one a prompt; its group of responses are consecutive rows. Raises RunError on every rank if more than
    config.max_error_share of the responses could not be graded.
    """
    num_rows = rollouts.num_sequences
    group_size = num_rows // len(references)
    mine = range(world.rank(), num_rows, world.size())
    responses = rollouts.responses()
    texts = tokenizer.batch_decode([responses[row] for row in mine], skip_special_tokens=True)
    grades = pool.score(texts, [references[row // group_size] for row in mine])
    any_form = config.answer_form == "any"  # then every response has it, and a number an answer is enough
    flat = torch.zeros(1 if any_form else 2, num_rows, dtype=torch.float64)
    flat[0, list(mine)] = torch.tensor([grade.score for grade in grades], dtype=torch.float64)
    flat[1:, list(mine)] = torch.tensor([has_form(text, config.answer_form) for text in texts], dtype=torch.float64)
    dist.all_reduce(flat, group=world)  # every row has one grader, the others add 0; an error is NaN and stays so
    errors = flat[0].isnan()
    if errors.double().mean() > config.max_error_share:
        raise RunError(_too_many_errors(int(errors.sum()), num_rows, grades, texts, config.max_error_share))
    shape = (len(references), group_size)
    formatted = torch.ones(shape, dtype=torch.bool) if any_form else flat[1].bool().view(shape)
    return Rewards(fill_errors(flat[0].view(shape)), errors.view(shape), formatted)


def mean_by_source(rewards: Rewards, sources: Sequence[str]) -> dict[str, float]:
    """reward/<source>/mean and reward/<source>/errors, where the prompts (`sources`: of each) are of more than one
    source. An error counts as in the matrix."""
    metrics = {}
    for source in sorted(set(sources)) if len(set(sources)) > 1 else ():
        rows = torch.tensor([own == source for own in sources])
        metrics[f"reward/{source}/mean"] = float(rewards.matrix[rows].mean())
        metrics[f"reward/{source}/errors"] = float(rewards.errors[rows].sum())
    return metrics


def _too_many_errors(num: int, num_rows: int, grades: list[Grade], texts: list[str], limit: float) -> str:
    """With different reasons first, each with the response that it is about."""
    examples = {grade.error: text for grade, text in zip(grades, texts, strict=True) if grade.error is not None}
    shown = [f"{error} (response {text!r:.80})" for error, text in list(examples.items())[:NUM_EXAMPLES]]
    return (
        f"the graders failed on {num} of {num_rows} responses of the batch, more than rewards.max_error_share = "
        f"{limit:g}; for example: {'; '.join(shown) or 'on another rank'}"
    )
