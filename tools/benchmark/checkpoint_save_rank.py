"""One rank of checkpoint_save.py: steps and saves, the two ways to save taking turns."""

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from update_workload import Workload, make_rollouts

from megatron_riskpo.config import ActorConfig, OptimizerConfig, RunConfig
from megatron_riskpo.distributed.launch import die_with_launcher, process_env
from megatron_riskpo.distributed.runtime import rank_runtime

if TYPE_CHECKING:
    from megatron_riskpo.actor.actor import Actor
    from megatron_riskpo.checkpoint.saver import CheckpointSaver
    from megatron_riskpo.distributed.grid import RankGrid
    from megatron_riskpo.rollout.types import Rollouts

TIMEOUT_S = 600.0


def step_seconds(actor: "Actor", batch: "Rollouts") -> float:
    """Of one optimizer step on solved examples, on all ranks."""
    from megatron_riskpo.actor.actor import supervised_loss

    dist.barrier()
    start = time.perf_counter()
    actor.train_step(batch, supervised_loss(batch), 1.0, num_optimizer_steps_total=1000)
    dist.barrier()
    return time.perf_counter() - start


def turn(saver: "CheckpointSaver", folder: Path, number: int, actor: "Actor", batch: "Rollouts") -> dict[str, float]:
    """A step, a save, a step, and the end of the write."""
    before = step_seconds(actor, batch)
    began, start = time.time(), time.perf_counter()
    saver.save(number, actor, {}, {})
    dist.barrier()
    stall = time.perf_counter() - start
    after = step_seconds(actor, batch)
    saver.wait()
    until_written = (folder / "latest").stat().st_mtime - began
    return {"step_before": before, "stall": stall, "step_after": after, "until_written": until_written}


def copy_seconds(checkpoint: Path, rank: int) -> tuple[float, float]:
    """Of `cp -r`, and of fsync after it; made by rank 0."""
    from megatron_riskpo.checkpoint.manifest import list_files, sync_to_disk

    dist.barrier()
    target = checkpoint.with_name("copy")
    start = time.perf_counter()
    if rank == 0:
        subprocess.run(["cp", "-r", checkpoint, target], check=True)
    copied = time.perf_counter() - start
    if rank == 0:
        for name in list_files(target):
            sync_to_disk(target / name)
    synced = time.perf_counter() - start
    if rank == 0:
        shutil.rmtree(target)
    dist.barrier()
    return copied, synced


def measure(task: dict[str, Any], grid: "RankGrid", config: ActorConfig) -> dict[str, Any]:
    """All turns of the two ways, and of the copies."""
    # Megatron may only be imported once rank_runtime has put the CPU backend in place.
    from megatron_riskpo.actor.actor import Actor
    from megatron_riskpo.checkpoint.manifest import read_manifest
    from megatron_riskpo.checkpoint.retention import Retention
    from megatron_riskpo.checkpoint.saver import CheckpointSaver

    actor = Actor.from_hf(task["model"], config, OptimizerConfig(lr=1e-6), torch.float32, grid)
    batch = make_rollouts(Workload(**task["workload"]))
    folders = {way: Path(task["folder"]) / way for way in ("synchronous", "asynchronous")}
    savers = {
        way: CheckpointSaver(
            folder, Retention(keep=1), {}, grid, asynchronous=way == "asynchronous", timeout_s=TIMEOUT_S
        )
        for way, folder in folders.items()
    }
    report: dict[str, Any] = {"synchronous": [], "asynchronous": [], "cp": [], "cp_fsync": []}
    for number in range(1 + task["turns"]):
        for way, saver in savers.items():
            report[way].append(turn(saver, folders[way], number, actor, batch))
        copied, synced = copy_seconds(folders["synchronous"] / f"step_{number}", grid.rank)
        report["cp"].append(copied)
        report["cp_fsync"].append(synced)
    report = {name: turns[1:] for name, turns in report.items()}
    return report | {"num_bytes": read_manifest(folders["synchronous"] / f"step_{number}").num_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path, help="JSON: workload, model, tp, turns, folder")
    arguments = parser.parse_args()
    die_with_launcher()
    env = process_env()
    if env is None:
        parser.error("start it through checkpoint_save.py, which gives it its ranks")
    task = json.loads(arguments.task.read_text())
    workload = Workload(**task["workload"])
    config = ActorConfig(tp=task["tp"], micro_batch_tokens=workload.micro_batch_tokens)
    with rank_runtime(env, RunConfig(), config) as grid:
        arguments.task.with_name(f"rank_{grid.rank}.json").write_text(json.dumps(measure(task, grid, config)))


if __name__ == "__main__":
    main()
