"""Run one function on n gloo ranks. Starting ranks costs seconds (imports), so one launch should run many cases."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run_on_ranks(target: str, num_ranks: int, folder: Path, timeout_s: float = 300) -> list[Any]:
    """Call `module:function(folder)` on every rank of a gloo group; returns what each rank returned.

    Fails with a rank's own output if one fails or the time is up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [(folder / f"rank_{rank}.log").open("w+") for rank in range(num_ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(num_ranks), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.distributed.ranks", target, str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(num_ranks)
    ]
    try:
        _wait(processes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(processes) if process.returncode != 0]
    if failed:
        first = (folder / f"rank_{failed[0]}.log").read_text()
        raise AssertionError(f"{target}: ranks {failed} of {num_ranks} failed; rank {failed[0]}:\n{first[-4000:]}")
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def release_groups() -> None:
    """Take down all groups but the world's. Each gloo group holds threads: after dozens of grids in one process,
    switching between them costs more than the cases. Call it on all ranks, when no actor is used any more."""
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _wait(processes: list[subprocess.Popen], deadline: float) -> None:
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.05)


def _main(target: str, folder: Path) -> None:
    import torch.distributed as dist

    from megatron_riskpo.distributed import cpu_backend

    cpu_backend.install()
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A file for the rendezvous: no port that another job could take.
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(folder)
    torch.save(result, folder / f"result_{rank}.pt")
    dist.barrier()
    # Megatron's and vLLM's finalizers race with each other at a regular exit; all work is done here.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
