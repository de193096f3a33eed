"""The built-in sampler on every two-rank layout; rank functions of test_megatron_engine."""

from pathlib import Path

import torch

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.rollout.megatron_engine import MegatronEngine
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig

# Lengths differ by more than max_response_tokens, so several batches; 3 prompts do not divide over 2 ranks.
PROMPTS = [[5, 17, 33, 2], [96], [8, 40, 11, 90, 7, 23, 64, 12, 30, 31, 7, 9, 50, 44, 3]]
SEEDS = [7, 8, 2**63 - 1]
SAMPLING = SamplingConfig(group_size=4, max_response_tokens=10, temperature=0.7, stop_token_ids=(1, 3, 5, 7, 11, 13))

LAYOUTS = {
    "tp2": ActorConfig(tp=2),
    "tp2 sp": ActorConfig(tp=2, sequence_parallel=True),
    "pp2": ActorConfig(pp=2),
    "dp2": ActorConfig(),
}


def build_actor(model_dir: Path, config: ActorConfig) -> Actor:
    grid = build_grid(config, seed=1)
    return Actor.from_hf(model_dir, config, OptimizerConfig(lr=1e-2), torch.float32, grid)


def build_engine(actor: Actor, max_num_seqs: int = 64) -> MegatronEngine:
    return MegatronEngine(actor.chunks[0], actor.grid, max_sequence_length=128, max_num_seqs=max_num_seqs)


def run(folder: Path) -> dict[tuple[str, str], tuple[Rollouts, torch.Tensor, dict[int, list[int]]]]:
    """For each layout: seeded samples, the log-probs that the actor itself gives them afterwards, and what this rank
    was told of meanwhile."""
    results = {}
    for layout, config in LAYOUTS.items():
        for tied in ("tied", "untied"):
            actor = build_actor(folder.parent / tied, config)
            told: dict[int, list[int]] = {}
            engine = build_engine(actor, max_num_seqs=5)
            rollouts = engine.generate(PROMPTS, SAMPLING, SEEDS, told.__setitem__)
            results[layout, tied] = rollouts, actor.logprobs(rollouts, SAMPLING.temperature), told
    return results
