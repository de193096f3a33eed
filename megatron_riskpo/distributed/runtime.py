"""What a rank process sets up before it builds anything, and takes down at its end."""

import contextlib
import logging
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from megatron_riskpo.config import ActorConfig, RunConfig
from megatron_riskpo.distributed import cpu_backend
from megatron_riskpo.distributed.grid import RankGrid, build_grid
from megatron_riskpo.distributed.launch import RankEnv, init_process_group


@contextlib.contextmanager
def rank_runtime(env: RankEnv, run: RunConfig, actor: ActorConfig) -> Iterator[RankGrid]:
    """Process groups and seeds for the length of the body."""
    quieten_libraries()
    cpu_backend.install()
    init_process_group(env, run.timeout_s)
    random.seed(run.seed)
    np.random.seed(run.seed % 2**32)
    torch.manual_seed(run.seed)
    try:
        yield build_grid(actor, run.seed, run.timeout_s)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def quieten_libraries() -> None:
    """Megatron and torch warn, on every rank, of what this project has dealt with (no Apex, old collective names)."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
    logging.getLogger("megatron").setLevel(logging.ERROR)
