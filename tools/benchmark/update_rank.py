"""One rank of update.py: the update phase under the given layouts, the ways to lay sequences out taking turns."""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from update_workload import LAYOUTS, WAYS, Layout, Workload, make_rollouts

from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.config import ActorConfig, OptimizerConfig, RunConfig
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.distributed.launch import die_with_launcher, process_env
from megatron_riskpo.distributed.runtime import rank_runtime

if TYPE_CHECKING:
    from update_ways import Batch, PlannedActor

OPTIMIZER = OptimizerConfig(lr=0.0)
"""Weights stay what they are: every update of every row computes the same gradient, whose norm can be compared."""


@dataclass(frozen=True)
class Turn:
    """One update, on this rank."""

    wall: float
    """Seconds between two barriers, the same on all ranks."""
    processor: float
    """Seconds of this process."""
    grad_norm: float


def update(actor: "PlannedActor", batch: "Batch", workload: Workload) -> Turn:
    """RiskPO's default loss, random advantages."""
    advantages = torch.randn(workload.num_sequences, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actor.given_plan = batch.plan
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    outputs = actor.update(
        batch.rollouts, advantages, batch.tokens, PolicyLossConfig(), 1.0, workload.max_response_tokens,
        num_optimizer_steps_total=1,
    )  # fmt: skip
    processor = time.process_time() - processor
    dist.barrier()
    return Turn(time.perf_counter() - wall, processor, outputs.metrics["actor/grad_norm"])


def measure(layout: Layout, workload: Workload, model: Path, repeats: int) -> dict[str, Any]:
    """Of each way: what it puts through the model, and its turns after one that does not count."""
    # Megatron may only be imported once rank_runtime has put the CPU backend in place.
    from update_ways import PlannedActor, make_batch

    config = layout.actor_config(workload)
    grid = build_grid(config, seed=0)
    actor = PlannedActor(load_model_config(model), config, OPTIMIZER, torch.float32, grid, model)
    rollouts = make_rollouts(workload)
    batches = {way: make_batch(way, rollouts, layout, workload, grid.dp.size()) for way in WAYS}
    turns = [{way: update(actor, batch, workload) for way, batch in batches.items()} for _ in range(1 + repeats)]
    return {
        way: {
            "tokens": int(batch.rollouts.lengths.sum()),
            "micro_batches": len(actor.plan_of(batch)[0]),
            "turns": [asdict(turn[way]) for turn in turns[1:]],
        }
        for way, batch in batches.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path, help="JSON: workload, layouts, model, repeats")
    arguments = parser.parse_args()
    die_with_launcher()
    env = process_env()
    if env is None:
        parser.error("start it through update.py, which gives it its ranks")
    task = json.loads(arguments.task.read_text())
    workload = Workload(**task["workload"])
    with rank_runtime(env, RunConfig(), ActorConfig()) as grid:
        report = {
            name: measure(LAYOUTS[name], workload, Path(task["model"]), task["repeats"]) for name in task["layouts"]
        }
        arguments.task.with_name(f"rank_{grid.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
