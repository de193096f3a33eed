"""pass@k of the current policy on held-out questions."""

from collections.abc import Sequence
from typing import Any

from torch.distributed import ProcessGroup

from megatron_riskpo.config import EvaluationConfig, RewardConfig
from megatron_riskpo.evaluation.passk import pass_at_k_table
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rewards.scoring import score_rollouts
from megatron_riskpo.rollout.types import RolloutEngine, SamplingConfig


def evaluate(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], references: Sequence[Reference], sampling: SamplingConfig,
    seeds: Sequence[int], config: EvaluationConfig, tokenizer: Any, pool: GraderPool, grading: RewardConfig,
    world: ProcessGroup, name: str = "heldout",
) -> dict[str, float]:  # fmt: skip
    """Unbiased eval/<name>/pass@k, with response length (tokens) and the share of truncated responses. Collective.

    A response is correct if its reward is above 0.5; one that could not be graded is not, and counted in
    eval/<name>/errors.
    """
    rollouts = engine.generate(prompts, sampling, seeds)
    rewards = score_rollouts(rollouts, references, tokenizer, pool, grading, world)
    table = pass_at_k_table((rewards.matrix > 0.5) & ~rewards.errors, config.ks)
    return {f"eval/{name}/pass@{k}": value for k, value in table.items()} | {
        f"eval/{name}/errors": float(rewards.errors.sum()),
        f"eval/{name}/response_length": float(rollouts.response_lengths.double().mean()),
        f"eval/{name}/truncated": float((~rollouts.finished).double().mean()),
    }
