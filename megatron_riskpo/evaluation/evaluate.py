"""pass@k of the current policy on held-out questions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.distributed import ProcessGroup

from megatron_riskpo.config import EvaluationConfig, RewardConfig
from megatron_riskpo.evaluation.grading import SOLVED_ABOVE, sample_and_grade
from megatron_riskpo.evaluation.intervals import share_intervals
from megatron_riskpo.evaluation.passk import question_pass_at_k
from megatron_riskpo.evaluation.summary import estimates
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.reference import Reference, rows_by_source
from megatron_riskpo.rewards.scoring import Rewards
from megatron_riskpo.rollout.types import RolloutEngine, Rollouts, SamplingConfig


def evaluate(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], references: Sequence[Reference], sampling: SamplingConfig,
    seeds: Sequence[int], config: EvaluationConfig, tokenizer: Any, pool: GraderPool, grading: RewardConfig,
    world: ProcessGroup, name: str = "heldout",
) -> dict[str, float]:  # fmt: skip
    """Unbiased eval/<name>/pass@k with the ends of its 95 % interval over questions (pass@k_low, pass@k_high), response
    length (tokens) and the share of truncated responses; where the questions are of more than one data source, the same
    of each as eval/<name>/<source>/*. Collective.

    A response is correct if its reward is above 0.5; one that could not be graded is not, and counted in
    eval/<name>/errors.
    """
    rollouts, rewards = sample_and_grade(engine, prompts, references, sampling, seeds, tokenizer, pool, grading, world)
    metrics = metrics_of(rollouts, rewards, range(len(prompts)), config.ks, f"eval/{name}")
    for source, rows in rows_by_source(reference.source for reference in references).items():
        metrics |= metrics_of(rollouts, rewards, rows, config.ks, f"eval/{name}/{source}")
    return metrics


def metrics_of(
    rollouts: Rollouts, rewards: Rewards, questions: Sequence[int], ks: Sequence[int], prefix: str
) -> dict[str, float]:
    """<prefix>/* of the given questions (rows of the rewards)."""
    rows = list(questions)
    matrix, errors = rewards.matrix[rows], rewards.errors[rows]
    lengths = rollouts.response_lengths.view_as(rewards.matrix)[rows]
    finished = rollouts.finished.view_as(rewards.matrix)[rows]
    return pass_at_k_metrics(((matrix > SOLVED_ABOVE) & ~errors).numpy(), ks, prefix) | {
        f"{prefix}/errors": float(errors.sum()),
        f"{prefix}/response_length": float(lengths.double().mean()),
        f"{prefix}/truncated": float((~finished).double().mean()),
    }


def pass_at_k_metrics(solved: NDArray[np.bool_], ks: Sequence[int], prefix: str) -> dict[str, float]:
    """<prefix>/pass@k, pass@k_low and pass@k_high, from bool [num_questions, num_samples]: the figures that
    `riskpo evaluate` shows."""
    passed = question_pass_at_k(solved, ks)
    columns = {f"{prefix}/pass@{k}": passed[:, column] for column, k in enumerate(ks)}
    metrics = {}
    for key, estimate in estimates(columns, share_intervals(passed)).items():
        metrics |= {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
    return metrics
