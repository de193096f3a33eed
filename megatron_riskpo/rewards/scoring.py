"""From finished responses to the reward matrix that every rank holds."""

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
from megatron_riskpo.rewards.pool import Grade, GraderPool, GradingBatch, fill_errors
from megatron_riskpo.rewards.reference import Reference, rows_by_source

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


class Scoring:
    """The grading of one batch of responses, which begins with each as it is finished.

    Each response is handed to `submit` on exactly one rank, whose processes grade it; one all-reduce joins them.
    """

    def __init__(self, tokenizer: Any, pool: GraderPool) -> None:
        self._tokenizer, self._batch = tokenizer, GradingBatch(pool)
        self._rows: list[int] = []
        self._texts: list[str] = []

    def submit(self, row: int, tokens: Sequence[int], reference: Reference) -> None:
        """Grade row `row` of the batch in the background."""
        (text,) = self._tokenizer.batch_decode([tokens], skip_special_tokens=True)
        self._rows.append(row)
        self._texts.append(text)
        self._batch.submit(text, reference)

    def rewards(self, num_prompts: int, group_size: int, config: RewardConfig, world: ProcessGroup) -> Rewards:
        """Of all num_prompts * group_size responses, a group's in consecutive rows; waits for those that are still
        graded. Collective. Raises RunError on every rank if more than config.max_error_share of the responses could
        not be graded, or if one was handed in on no rank."""
        grades = self._batch.grades()
        any_form = config.answer_form == "any"  # then every response has it, and a number an answer is enough
        flat = torch.full((1 if any_form else 2, num_prompts * group_size), -torch.inf, dtype=torch.float64)
        scores = [torch.inf if grade.error is not None else grade.score for grade in grades]
        flat[0, self._rows] = torch.tensor(scores, dtype=torch.float64)
        formatted = [has_form(text, config.answer_form) for text in self._texts]
        flat[1:, self._rows] = torch.tensor(formatted, dtype=torch.float64)
        # Scores are finite: infinity stands for an error, and minus infinity, which any grade outdoes, for no grade.
        dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=world)
        self._check(flat[0], grades, config.max_error_share)
        shape = (num_prompts, group_size)
        errors = flat[0].isposinf().view(shape)
        matrix = fill_errors(flat[0].view(shape).masked_fill(errors, torch.nan))
        return Rewards(matrix, errors, torch.ones(shape, dtype=torch.bool) if any_form else flat[1].bool().view(shape))

    def _check(self, scores: Tensor, grades: Sequence[Grade], limit: float) -> None:
        """`scores`: of all ranks, `grades`: of this one."""
        num_missing = int(scores.isneginf().sum())
        if num_missing:
            raise RunError(f"{num_missing} of {len(scores)} responses of the batch were handed to no grader")
        num_errors = int(scores.isposinf().sum())
        if num_errors / len(scores) > limit:
            raise RunError(_too_many_errors(num_errors, len(scores), grades, self._texts, limit))


def mean_by_source(rewards: Rewards, sources: Sequence[str]) -> dict[str, float]:
    """reward/<source>/mean and reward/<source>/errors, where the prompts (`sources`: of each) are of more than one
    source. An error counts as in the matrix."""
    metrics = {}
    for source, rows in rows_by_source(sources).items():
        metrics[f"reward/{source}/mean"] = float(rewards.matrix[rows].mean())
        metrics[f"reward/{source}/errors"] = float(rewards.errors[rows].sum())
    return metrics


def _too_many_errors(num: int, num_rows: int, grades: Sequence[Grade], texts: Sequence[str], limit: float) -> str:
    """With different reasons first, each with the response that it is about."""
    examples = {grade.error: text for grade, text in zip(grades, texts, strict=True) if grade.error is not None}
    shown = [f"{error} (response {text!r:.80})" for error, text in list(examples.items())[:NUM_EXAMPLES]]
    return (
        f"the graders failed on {num} of {num_rows} responses of the batch, more than rewards.max_error_share = "
        f"{limit:g}; for example: {'; '.join(shown) or 'on another rank'}"
    )
