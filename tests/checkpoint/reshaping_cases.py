"""What one rank does in test_reshaping: save under one layout, go on under another. Imported by the ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_riskpo.actor.actor import Actor, supervised_loss
from megatron_riskpo.checkpoint.retention import Retention
from megatron_riskpo.checkpoint.training_state import load_checkpoint, save_checkpoint, verified_checkpoint
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import RankGrid, build_grid
from tests.distributed.layout_cases import ragged_rollouts
from tests.distributed.ranks import release_groups

# A large eps: near g = 0 AdamW's g / (|g| + eps) would turn rounding into a whole step.
OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="cosine", eps=1e-3, weight_decay=0.1)
NUM_STEPS, SAVED_AT, NUM_AFTER = 10, 2, 2

Layout = dict[str, Any]
DENSE: dict[str, Layout] = {
    "tp2 pp2": {"tp": 2, "pp": 2},
    "pp2 vp2 dp2": {"pp": 2, "vp": 2},
    "dp4": {},
    "tp2 dp2": {"tp": 2},
    "pp2 cp2": {"pp": 2, "cp": 2},
}
MOE: dict[str, Layout] = {
    "ep2 dp4": {"ep": 2},
    "pp2 ep2 dp2": {"pp": 2, "ep": 2},
    "tp2 sp ep4 dp2": {"tp": 2, "sequence_parallel": True, "ep": 4},
    "cp2 etp2 dp2": {"cp": 2, "etp": 2},
}
LAYOUTS: dict[tuple[str, int], dict[str, Layout]] = {
    ("dense", 4): DENSE, ("moe", 4): MOE, ("dense", 1): {"one": {}}, ("moe", 1): {"one": {}},
}  # fmt: skip
PAIRS: dict[str, list[tuple[str, str]]] = {
    "dense": [
        *(("tp2 pp2", "dp4"), ("dp4", "pp2 vp2 dp2"), ("pp2 vp2 dp2", "tp2 dp2"), ("tp2 dp2", "pp2 cp2")),
        *(("pp2 cp2", "tp2 pp2"), ("tp2 pp2", "one"), ("pp2 vp2 dp2", "one")),
    ],
    "moe": [
        *(("ep2 dp4", "pp2 ep2 dp2"), ("pp2 ep2 dp2", "tp2 sp ep4 dp2"), ("tp2 sp ep4 dp2", "ep2 dp4")),
        *(("pp2 ep2 dp2", "one"), ("tp2 sp ep4 dp2", "one")),
        ("cp2 etp2 dp2", "pp2 ep2 dp2"),
    ],
}
"""Saved under, loaded under."""
SAVED = {kind: sorted({saved for saved, _ in pairs}) for kind, pairs in PAIRS.items()}


def actor_of(grid: RankGrid, config: ActorConfig, folder: Path, kind: str, seed: int) -> Actor:
    """Other weights for other seeds."""
    torch.manual_seed(seed)
    return Actor.from_hf(folder.parent / f"{kind}_{seed}", config, OPTIMIZER, torch.float32, grid)


def losses(actor: Actor, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of optimizer steps on solved examples that depend on the step only."""
    found = []
    for step in steps:
        batch, _, _ = ragged_rollouts(8, seed=step)
        _, metrics = actor.train_step(batch, supervised_loss(batch), 1.0, NUM_STEPS)
        found.append((metrics["sft/loss"], metrics["actor/grad_norm"]))
    return found


def save_and_go_on(grid: RankGrid, config: ActorConfig, folder: Path, kind: str, layout: str) -> dict[str, Any]:
    """The uninterrupted run, with a checkpoint on its way; and the same layout again from the checkpoint."""
    actor = actor_of(grid, config, folder, kind, seed=1)
    losses(actor, range(SAVED_AT))
    path = save_checkpoint(folder.parent / "saved" / kind / layout, SAVED_AT, actor, {}, {}, Retention())
    return {
        "expected": losses(actor, range(SAVED_AT, SAVED_AT + NUM_AFTER)),
        "again": go_on(grid, config, folder, kind, path),
    }


def go_on(grid: RankGrid, config: ActorConfig, folder: Path, kind: str, path: Path) -> list[tuple[float, float]]:
    actor = actor_of(grid, config, folder, kind, seed=2)
    load_checkpoint(verified_checkpoint(path, grid.world), actor)
    return losses(actor, range(SAVED_AT, SAVED_AT + NUM_AFTER))


def run(folder: Path) -> dict[tuple[str, str], Any]:
    """First all layouts save that some pair starts from, then all pairs whose second layout has so many ranks."""
    num_ranks, results = dist.get_world_size(), {}
    for kind in PAIRS:
        layouts = LAYOUTS[kind, num_ranks]
        for layout in (name for name in layouts if name in SAVED[kind]):
            config = ActorConfig(**{"micro_batch_tokens": 100, **layouts[layout]})
            grid = build_grid(config, seed=1)
            results[kind, layout] = save_and_go_on(grid, config, folder, kind, layout)
            release_groups()
        for saved, loaded in (pair for pair in PAIRS[kind] if pair[1] in layouts):
            config = ActorConfig(**{"micro_batch_tokens": 100, **layouts[loaded]})
            grid = build_grid(config, seed=1)
            path = folder.parent / "saved" / kind / saved / f"step_{SAVED_AT}"
            results[kind, saved, loaded] = go_on(grid, config, folder, kind, path)
            release_groups()
    return results
