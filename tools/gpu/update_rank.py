"""The process of update.py: one rank on one GPU (or on the CPU), one setting of recompute."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmark"))

from ceilings import describe, measure_ceilings, wait_for
from update_workload import Workload, make_rollouts

from megatron_riskpo.actor.flops import ModelFlops
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.config import ActorConfig, OptimizerConfig, RunConfig
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.distributed.launch import die_with_launcher, process_env
from megatron_riskpo.distributed.runtime import rank_runtime
from megatron_riskpo.observability.memory import PhaseMemory
from megatron_riskpo.observability.performance import peak_flops, update_metrics

DTYPE = torch.bfloat16


def measure_updates(task: dict[str, Any], config: ActorConfig, grid: RankGrid) -> dict[str, Any]:
    """Every update on the same rollouts; the peak is that of the measured ones, model and optimizer included."""
    # Megatron may only be imported once rank_runtime has put the CPU backend in place.
    from megatron_riskpo.actor.actor import Actor

    workload = Workload(**task["workload"])
    actor = Actor(workload.hf_config(), config, OptimizerConfig(), DTYPE, grid)
    rollouts = make_rollouts(workload)
    advantages = torch.randn(workload.num_sequences, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    num_steps = task["warmup"] + task["steps"]
    memory, seconds = PhaseMemory(), []
    for step in range(num_steps):
        if step == task["warmup"]:
            memory.take()
        with memory("update"):
            wait_for(grid.device)
            start = time.perf_counter()
            outputs = actor.update(
                rollouts, advantages, TokenInputs(), PolicyLossConfig(), 1.0, workload.max_response_tokens, num_steps
            )
            wait_for(grid.device)
            seconds.append(time.perf_counter() - start)
    measured = seconds[task["warmup"] :]
    lengths, num_targets = rollouts.lengths.tolist(), int(rollouts.response_lengths.sum())
    flops = ModelFlops.from_hf_config(actor.hf_config)
    return {
        "num_parameters": sum(p.numel() for chunk in actor.chunks for p in chunk.parameters()),
        "tokens": sum(lengths),
        "response_tokens": num_targets,
        "seconds": measured,
        **update_metrics(flops, lengths, num_targets, median(measured), 1, peak_flops(grid.device, DTYPE)),
        **memory.take(),
        "actor/grad_norm": outputs.metrics["actor/grad_norm"],
    }


def run(task: dict[str, Any], config: ActorConfig, grid: RankGrid) -> dict[str, Any]:
    ceilings = measure_ceilings(grid.device, DTYPE, task["small"])
    report = describe(grid.device) | {"ceilings": asdict(ceilings)}
    try:
        measured = measure_updates(task, config, grid)
    except torch.OutOfMemoryError as error:
        return report | {"out_of_memory": str(error)}
    share = measured["perf/model_tflops"] * 1e12 / ceilings.matrix_flops
    return report | measured | {"share_of_matrix_ceiling": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path)
    parser.add_argument("report", type=Path)
    arguments = parser.parse_args()
    die_with_launcher()
    env = process_env()
    if env is None:
        parser.error("start it through update.py, which gives it its rank")
    task = json.loads(arguments.task.read_text())
    config = ActorConfig(micro_batch_tokens=task["workload"]["micro_batch_tokens"], recompute=task["recompute"])
    with rank_runtime(env, RunConfig(), config) as grid:
        arguments.report.write_text(json.dumps(run(task, config, grid)))


if __name__ == "__main__":
    main()
