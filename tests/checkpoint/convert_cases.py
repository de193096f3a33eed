"""What the ranks do for test_convert: load what was converted into actors of other weights, laid out over four ranks,
by Megatron's own loader; save it as a run does; and load that again, whole on every rank."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.checkpoint.logprob_check import load_weights
from megatron_riskpo.checkpoint.manifest import SHARDED
from megatron_riskpo.checkpoint.retention import Retention
from megatron_riskpo.checkpoint.training_state import save_checkpoint
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.distributed.grid import RankGrid, build_grid
from tests.distributed.ranks import release_groups
from tests.tiny_models import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [(family, tied, dtype) for family in FAMILIES for tied in (True, False) for dtype in DTYPES]
WHOLE = [(family, index % 2 == 0, "float32") for index, family in enumerate(FAMILIES)]
"""Loaded without any splitting as well."""
NUM_RANKS = 4
STEP = 7


def model_name(family: str, tied: bool) -> str:
    return f"{family}_{'tied' if tied else 'untied'}"


def run_name(family: str, tied: bool, dtype: str) -> str:
    return f"{model_name(family, tied)}_{dtype}"


def layouts() -> list[tuple[ActorConfig, set[str]]]:
    """Every dimension of splitting that a family's weights have, and the families."""
    experts = {family for family in FAMILIES if "moe" in family or family == "mixtral"}
    return [
        (ActorConfig(tp=2, pp=2), FAMILIES.keys() - experts),
        (ActorConfig(tp=2, ep=2, pp=2, sequence_parallel=True), experts - {"mixtral"}),
        (ActorConfig(tp=2, pp=2, etp=2, sequence_parallel=True), {"mixtral"}),
    ]


def random_actor(model: Path, config: ActorConfig, dtype: str, grid: RankGrid) -> Actor:
    return Actor(load_model_config(model), config, OptimizerConfig(), DTYPES[dtype], grid)


def load_and_save(folder: Path) -> dict[str, dict[str, Tensor]]:
    """megatron/NAME -> runs/NAME/checkpoints/step_7, beside `folder`; by name, weights of some when loaded whole."""
    root = folder.parent
    for config, families in layouts():
        grid = build_grid(config, 1)
        for family, tied, dtype in (case for case in CASES if case[0] in families):
            name = run_name(family, tied, dtype)
            actor = random_actor(root / model_name(family, tied), config, dtype, grid)
            load_weights(actor.chunks, root / "megatron" / name, grid)
            save_checkpoint(root / "runs" / name / "checkpoints", STEP, actor, {}, {}, Retention())
        release_groups()
    return load_whole(root)


def load_whole(root: Path) -> dict[str, dict[str, Tensor]]:
    config, results = ActorConfig(), {}
    grid = build_grid(config, 1)
    for family, tied, dtype in WHOLE:
        name = run_name(family, tied, dtype)
        actor = random_actor(root / model_name(family, tied), config, dtype, grid)
        load_weights(actor.chunks, root / "runs" / name / "checkpoints" / f"step_{STEP}" / SHARDED, grid)
        results[name] = {key: tensor.clone() for key, tensor in actor.export_weights()}
    return results
