"""What one rank does in test_hf_parity: log-probs of every family, float32 and bfloat16, whole and split in two."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from tests.distributed.layout_cases import TEMPERATURE, ragged_rollouts
from tests.distributed.ranks import release_groups
from tests.tiny_models import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"tp1": ActorConfig(micro_batch_tokens=150), "tp2": ActorConfig(tp=2, sequence_parallel=True)}


def run(folder: Path) -> dict[tuple[str, str, str], tuple[Tensor, dict[str, Tensor]]]:
    """By (family, dtype, layout): log-probs of the response tokens, and the weights as they are exported."""
    rollouts, _, _ = ragged_rollouts()
    results = {}
    for layout, config in LAYOUTS.items():
        grid = build_grid(config, seed=1)
        for family in FAMILIES:
            for name, dtype in DTYPES.items():
                actor = Actor.from_hf(folder.parent / family, config, OptimizerConfig(), dtype, grid)
                exported = {key: tensor.clone() for key, tensor in actor.export_weights()}
                results[family, name, layout] = (actor.logprobs(rollouts, TEMPERATURE), exported)
        release_groups()
    return results
