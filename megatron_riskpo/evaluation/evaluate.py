"""pass@k of the current policy on held-out questions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.distributed import ProcessGroup

from megatron_riskpo.config import EvaluationConfig, RewardConfig
from megatron_riskpo.evaluation.grading import SOLVED_ABOVE
from megatron_riskpo.evaluation.intervals import share_intervals
from megatron_riskpo.evaluation.passk import question_pass_at_k
from megatron_riskpo.evaluation.summary import estimates
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rewards.scoring import score_rollouts
from megatron_riskpo.rollout.types import RolloutEngine, SamplingConfig


def evaluate(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], references: Sequence[Reference], sampling: SamplingConfig,
    seeds: Sequence[int], config: EvaluationConfig, tokenizer: Any, pool: GraderPool, grading: RewardConfig,
    world: ProcessGroup, name: str = "heldout",
) -> dict[str, float]:  # fmt: skip
    """Unbiased eval/<name>/pass@k with the ends of its 95 % interval over questions (pass@k_low, pass@k_high), response
    length (tokens) and the share of truncated responses. Collective.

    A response is correct if its reward is above 0.5; one that could not be graded is not, and counted in
    eval/<name>/errors.
    """
    rollouts = engine.generate(prompts, sampling, seeds)
    rewards = score_rollouts(rollouts, references, tokenizer, pool, grading, world)
    solved = (rewards.matrix > SOLVED_ABOVE) & ~rewards.errors
    return pass_at_k_metrics(solved.numpy(), config.ks, name) | {
        f"eval/{name}/errors": float(rewards.errors.sum()),
        f"eval/{name}/response_length": float(rollouts.response_lengths.double().mean()),
        f"eval/{name}/truncated": float((~rollouts.finished).double().mean()),
    }


def pass_at_k_metrics(solved: NDArray[np.bool_], ks: Sequence[int], name: str) -> dict[str, float]:
    """eval/<name>/pass@k, pass@k_low and pass@k_high, from bool [num_questions, num_samples]: the figures that
    `riskpo evaluate` shows."""
    passed = question_pass_at_k(solved, ks)
    columns = {f"eval/{name}/pass@{k}": passed[:, column] for column, k in enumerate(ks)}
    metrics = {}
    for key, estimate in estimates(columns, share_intervals(passed)).items():
        metrics |= {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
    return metrics
