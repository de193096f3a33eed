"""What one rank does in test_packing_leaks: a pack, and the same with one of its sequences changed."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.actor.packing import MicroBatch
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.rollout.types import Rollouts
from tests.distributed.layout_cases import TEMPERATURE, gradients_in_hf_layout, ragged_rollouts
from tests.distributed.ranks import release_groups
from tests.tiny_models import VOCAB_SIZE

CHANGED = 2
"""The sequence that is changed; it lies between others in the pack."""
NUM_SEQUENCES = 6
LAYOUTS = {
    "tp2 sp": ActorConfig(tp=2, sequence_parallel=True),
    "cp2": ActorConfig(cp=2),
    "pp2": ActorConfig(pp=2),
    "pp2, recompute layers": ActorConfig(pp=2, recompute="full"),
}


def changed(rollouts: Rollouts) -> Rollouts:
    """Other tokens in one sequence, prompt and response."""
    start, length = int(rollouts.lengths[:CHANGED].sum()), int(rollouts.lengths[CHANGED])
    tokens = rollouts.tokens.clone()
    tokens[start : start + length] = (tokens[start : start + length] + 7) % VOCAB_SIZE
    return dataclasses.replace(rollouts, tokens=tokens)


def loss_of_neighbours(batch: MicroBatch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of all tokens but those of the changed sequence, each with a weight of its own."""
    rows = torch.tensor(batch.rows).repeat_interleave(batch.response_lengths)
    weights = (1 + torch.arange(rows.numel()) % 5) * (rows != CHANGED)
    loss = (weights * logprobs).sum() + (weights * entropies).sum()
    return loss, {"loss": loss.detach()}


def run(folder: Path) -> dict[str, list[tuple[Tensor, dict[str, Tensor]]]]:
    """By layout, before and after the change: log-probs, and the gradients of the neighbours' loss."""
    rollouts, _, _ = ragged_rollouts(NUM_SEQUENCES)
    results = {}
    for layout, options in LAYOUTS.items():
        config = dataclasses.replace(options, distributed_optimizer=False)
        grid = build_grid(config, seed=1)
        # A learning rate of 0: both see the same weights.
        actor = Actor.from_hf(folder.parent / "model", config, OptimizerConfig(lr=0.0), torch.float32, grid)
        results[layout] = []
        for batch in (rollouts, changed(rollouts)):
            logprobs, _ = actor.train_step(batch, loss_of_neighbours, TEMPERATURE, 10)
            results[layout].append((logprobs, gradients_in_hf_layout(actor)))
        release_groups()
    return results
