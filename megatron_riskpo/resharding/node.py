"""How many ranks share a machine: sources on the own one are preferred."""

import os
import re
from collections.abc import Mapping

import torch
from torch.distributed import ProcessGroup


def node_size(world_size: int, environ: Mapping[str, str] = os.environ) -> int:
    """As torchrun or Slurm say; else one rank for each visible GPU, without GPUs all."""
    said = environ.get("LOCAL_WORLD_SIZE") or environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    uniform = re.fullmatch(r"(\d+)(\(x\d+\))?", said)
    return int(uniform[1]) if uniform else torch.cuda.device_count() or world_size


def agreed_node_size(group: ProcessGroup) -> int:
    """Rank 0's, on every rank: where nodes have different numbers of ranks all have to plan alike. Collective."""
    # Imported here: servers, which are told, need none of it.
    from megatron_riskpo.checkpoint.together import from_first

    return from_first(node_size(group.size()), group)
