"""What one rank does in test_reference. Imported by the ranks."""

from pathlib import Path
from typing import Any

import torch

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.actor.reference import ReferenceWeights
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from tests.distributed.layout_cases import TEMPERATURE, ragged_rollouts

LAYOUTS = {
    "tp2 pp2": (ActorConfig(tp=2, pp=2, distributed_optimizer=False), torch.float32),
    "tp2 dp2 distributed optimizer": (ActorConfig(tp=2), torch.float32),
    "pp2 dp2 distributed optimizer, bfloat16": (ActorConfig(pp=2), torch.bfloat16),
}


def two_updates(config: ActorConfig, dtype: torch.dtype, model_dir: Path, *, looks_back: bool) -> dict[str, Any]:
    """Log-probs at the start, of the reference after each update (if looks_back), and the weights at the end."""
    grid = build_grid(config, seed=1)
    actor = Actor.from_hf(model_dir, config, OptimizerConfig(lr=1e-2), dtype, grid)
    reference = ReferenceWeights(torch.nn.ModuleList(actor.chunks))
    rollouts, advantages, _ = ragged_rollouts()
    result: dict[str, Any] = {"start": actor.logprobs(rollouts, TEMPERATURE), "reference": [], "policy": []}
    for _ in range(2):
        actor.update(rollouts, advantages, TokenInputs(), PolicyLossConfig(), TEMPERATURE, 40, 10)
        if looks_back:
            with reference.in_place():
                result["reference"].append(actor.logprobs(rollouts, TEMPERATURE))
        result["policy"].append(actor.logprobs(rollouts, TEMPERATURE))
    return result | {"weights": {name: tensor.clone() for name, tensor in actor.export_weights()}}


def run(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """With a look at the reference after each update, and without."""
    return {
        name: tuple(two_updates(config, dtype, folder.parent / "model", looks_back=look) for look in (True, False))
        for name, (config, dtype) in LAYOUTS.items()
    }
