"""What one rank does in test_loss_invariance: the same mini-batch, cut in many ways. Imported by the ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.rollout.types import Rollouts
from tests.distributed.layout_cases import gradients_in_hf_layout, ragged_rollouts

TEMPERATURE = 0.8
NUM_SEQUENCES = 24
MAX_RESPONSE_TOKENS = 40
MICRO_BATCH_SIZES = (1, 3, 8, NUM_SEQUENCES)
"""Sequences packed into a micro-batch; with 1 nothing is packed."""
KINDS: dict[str, dict[str, float]] = {
    "ppo": {"dual_clip": 1.5},
    "gspo": {"clip_low": 0.01, "clip_high": 0.01},
    "gmpo": {"clip_low": 0.1, "clip_high": 0.1},
    "cispo": {},
    "clip_cov": {"cov_fraction": 0.05},
    "kl_cov": {"cov_fraction": 0.05},
}
AGGREGATIONS = ("sequence_mean", "token_mean", "sequence_mean_token_sum_norm")
LOSSES = {
    (kind, aggregation): PolicyLossConfig(
        kind=kind, aggregation=aggregation, kl_coefficient=0.1, entropy_coefficient=0.01, **options
    )
    for kind, options in KINDS.items()
    for aggregation in AGGREGATIONS
}


def the_rollouts() -> tuple[Rollouts, torch.Tensor]:
    """And their advantages."""
    rollouts, advantages, _ = ragged_rollouts(NUM_SEQUENCES, seed=8)
    return rollouts, advantages


def plan(num_ranks: int, size: int) -> list[list[list[int]]]:
    """Rows dealt out to the data-parallel ranks, then cut into micro-batches of `size`."""
    dealt = [list(range(rank, NUM_SEQUENCES, num_ranks)) for rank in range(num_ranks)]
    return [[rows[start : start + size] for start in range(0, len(rows), size)] for rows in dealt]


def run(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """By (kind, aggregation, micro-batch size): metrics and gradient of one update."""
    grid = build_grid(ActorConfig(), seed=1)
    # A learning rate of 0: all cases see the same weights. No clipping: it would hide the gradient's size.
    optimizer = OptimizerConfig(lr=0.0, clip_grad=0.0)
    actor = Actor.from_hf(
        folder.parent / "model", ActorConfig(distributed_optimizer=False), optimizer, torch.float32, grid
    )
    rollouts, advantages = the_rollouts()
    tokens = TokenInputs(**torch.load(folder.parent / "tokens.pt"))
    results = {}
    for size in MICRO_BATCH_SIZES:
        actor._plan = lambda rollouts, size=size: plan(dist.get_world_size(), size)  # type: ignore[method-assign]
        for (kind, aggregation), loss in LOSSES.items():
            metrics = actor.update(
                rollouts, advantages, tokens, loss, TEMPERATURE, MAX_RESPONSE_TOKENS, num_optimizer_steps_total=10**3
            ).metrics
            results[kind, aggregation, size] = {"metrics": metrics, "gradient": gradients_in_hf_layout(actor)}
    return results
