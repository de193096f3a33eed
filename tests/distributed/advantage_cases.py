"""What one rank does in test_global_advantages. Imported by the ranks; needs no Megatron."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_riskpo.algorithms import AlgorithmConfig, compute_advantages
from megatron_riskpo.config import RewardConfig
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rewards.scoring import Rewards, Scoring
from megatron_riskpo.rollout.types import OnFinished, Rollouts

NUM_PROMPTS, GROUP_SIZE = 12, 8
REFERENCES = [Reference("1")] * NUM_PROMPTS
ESTIMATORS = {
    "riskpo": AlgorithmConfig(bundle_size=5),
    "riskpo tracked": AlgorithmConfig(bundle_size=4, quantile_source="tracked", scale="batch_std"),
    "riskpo self": AlgorithmConfig(bundling="self", bundle_size=4, baseline="leave_one_out"),
    "grpo": AlgorithmConfig(estimator="grpo"),
}
_draws = torch.rand(3, NUM_PROMPTS, GROUP_SIZE, generator=torch.Generator().manual_seed(1))
REWARDS = (_draws < torch.linspace(0.05, 0.95, NUM_PROMPTS)[:, None]).double()
"""[steps, P, G] of 0 and 1, easy and hard questions."""


class DigitTokenizer:
    """Token n is the text "n"."""

    def batch_decode(self, sequences: list[Any], skip_special_tokens: bool) -> list[str]:
        return [str(int(sequence[0])) for sequence in sequences]


def rollouts_that_earn(rewards: torch.Tensor) -> Rollouts:
    """Prompt 7, response 1 where the reward is to be 1 and 0 elsewhere (the expected answer is 1)."""
    responses = rewards.flatten().long()
    ones = torch.ones(responses.numel(), dtype=torch.long)
    tokens = torch.stack([7 * ones, responses], dim=1).flatten()
    return Rollouts(tokens, ones, ones, torch.zeros(responses.numel()), ones.bool())


def tell_share(rollouts: Rollouts, world: dist.ProcessGroup, on_finished: OnFinished) -> None:
    """Tell of every response on one rank."""
    responses = rollouts.responses()
    for row in range(world.rank(), rollouts.num_sequences, world.size()):
        on_finished(row, responses[row].tolist())


def score_rollouts(
    rollouts: Rollouts, references: list[Reference], tokenizer: Any, pool: Any, config: RewardConfig,
    world: dist.ProcessGroup | None,
) -> Rewards:  # fmt: skip
    """Grade responses that are there, one reference a prompt."""
    assert world is not None
    scoring, group_size = Scoring(tokenizer, pool), rollouts.num_sequences // len(references)
    tell_share(rollouts, world, lambda row, tokens: scoring.submit(row, tokens, references[row // group_size]))
    return scoring.rewards(len(references), group_size, config, world)


def advantages_on_this_rank(folder: Path) -> dict[str, list[Any]]:
    """(advantages, metrics, number of errors) of three steps, by estimator."""
    results: dict[str, list[Any]] = {}
    with GraderPool(["math"], workers=1) as pool:
        for name, config in ESTIMATORS.items():
            tracker, generator, results[name] = None, torch.Generator().manual_seed(3), []
            for rewards in REWARDS:
                rollouts = rollouts_that_earn(rewards)
                scored = score_rollouts(rollouts, REFERENCES, DigitTokenizer(), pool, RewardConfig(), dist.group.WORLD)
                outputs = compute_advantages(scored.matrix, config, tracker=tracker, generator=generator)
                tracker = outputs.tracker
                results[name].append((outputs.advantages, outputs.metrics, int(scored.errors.sum())))
    return results
