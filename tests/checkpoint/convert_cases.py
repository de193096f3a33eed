"""What the ranks do for test_convert: save a training checkpoint of every family, laid out over four."""

from pathlib import Path

import torch

from megatron_riskpo.actor.actor import Actor
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
        save_checkpoint(folder.parent / "runs" / name / "checkpoints", STEP, actor, {}, keep=1)
