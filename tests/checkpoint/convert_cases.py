"""What the ranks do for test_convert: save a training checkpoint of every family, laid out over four, and load what was
converted."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.checkpoint.retention import Retention
from megatron_riskpo.checkpoint.training_state import save_checkpoint
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from tests.tiny_models import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Every family tied and untied, in both dtypes; which goes with which does not matter.
CASES = [
    (family, tied, "float32" if (index % 2 == 0) == tied else "bfloat16")
    for index, family in enumerate(FAMILIES)
    for tied in (True, False)
]
LOADED = [("qwen2", True), ("qwen3_moe", False)]
NUM_RANKS = 4
STEP = 7


def model_name(family: str, tied: bool) -> str:
    return f"{family}_{'tied' if tied else 'untied'}"


def layout(family: str) -> ActorConfig:
    """Every dimension of splitting that the family's weights have."""
    if "moe" in family or family == "mixtral":
        return ActorConfig(tp=2, ep=2, pp=2, sequence_parallel=True)
    return ActorConfig(tp=2, pp=2)


def save_all(folder: Path) -> None:
    """runs/NAME/checkpoints/step_7 beside `folder`, of the models there."""
    for family, tied, dtype in CASES:
        name, config = model_name(family, tied), layout(family)
        actor = Actor.from_hf(folder.parent / name, config, OptimizerConfig(), DTYPES[dtype], build_grid(config, 1))
        save_checkpoint(folder.parent / "runs" / name / "checkpoints", STEP, actor, {}, {}, Retention())


def load_converted(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By name: the weights of an actor of other weights, after Megatron's own loader has read what hf-to-megatron
    wrote to megatron/NAME beside `folder`."""
    results = {}
    for family, tied in LOADED:
        name, config = model_name(family, tied), layout(family)
        actor = Actor.from_hf(
            folder.parent / f"{name}_other", config, OptimizerConfig(), torch.float32, build_grid(config, 1)
        )
        metadata = {"singleton_local_shards": False, "dp_cp_group": actor.grid.dp_cp}
        for chunk in actor.chunks:
            wanted = chunk.sharded_state_dict(metadata=metadata)
            chunk.load_state_dict(dist_checkpointing.load(wanted, str(folder.parent / "megatron" / name)))
        results[name] = {key: tensor.clone() for key, tensor in actor.export_weights()}
    return results


def save_and_load(folder: Path) -> dict[str, dict[str, Tensor]]:
    save_all(folder)
    return load_converted(folder)
