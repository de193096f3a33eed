"""Run one function on n gloo ranks. One launch should run many cases: models, vLLM and groups take their time."""

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.distributed.shared_gloo import share_device

ROOT = Path(__file__).parents[2]

# Ranks are forked, from one process that has imported torch and Megatron-Core: importing takes each some four seconds.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.distributed.preloaded"])


def run_on_ranks(target: str, num_ranks: int, folder: Path, timeout_s: float = 300) -> list[Any]:
    """Call `module:function(folder)` on every rank of a gloo group; returns what each rank returned.

    Fails with a rank's own output if one fails or the time is up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes: list[BaseProcess] = []
    try:
        for rank in range(num_ranks):
            processes.append(fork(_main, target, folder, rank, num_ranks))
        codes = _wait(processes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
    # Those that wait for one that failed have no code yet.
    failed = [rank for rank, code in enumerate(codes) if code] or [r for r, code in enumerate(codes) if code is None]
    if failed:
        first = _log(folder, failed[0]).read_text()
        raise AssertionError(f"{target}: ranks {failed} of {num_ranks} failed; rank {failed[0]}:\n{first[-4000:]}")
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def fork(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that starts with what `preloaded` imports."""
    process = _FORKS.Process(target=target, args=arguments)
    process.start()
    return process


@contextlib.contextmanager
def processes(target: Callable[..., None], arguments: Sequence[tuple]) -> Iterator[list[BaseProcess]]:
    """Forks of `target`, one for each of the arguments; killed at the end."""
    started = [fork(target, *of) for of in arguments]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.log"


def release_groups() -> None:
    """Take down all groups but the world's, each of which holds threads. Call it on all ranks, when no actor is used
    any more."""
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _wait(processes: list[BaseProcess], deadline: float) -> list[int | None]:
    """Until all have ended, one has failed, or the time is up; their exit codes."""
    while True:
        codes = [process.exitcode for process in processes]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(0.05)


def _main(target: str, folder: Path, rank: int, num_ranks: int) -> None:
    import torch.distributed as dist

    # Where the fork server did not find it, its errors being silent.
    importlib.import_module("tests.distributed.preloaded")
    log = os.open(_log(folder, rank), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(num_ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    share_device()
    # A file for the rendezvous: no port that another job could take.
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(folder)
    torch.save(result, folder / f"result_{rank}.pt")
    dist.barrier()
    # Megatron's and vLLM's finalizers race with each other at a regular exit; all work is done here.
    sys.stdout.flush()
    os._exit(0)
