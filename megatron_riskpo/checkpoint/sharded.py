"""Model and optimizer in Megatron's torch_dist format: each rank writes its part, any layout reads it.

Megatron's own save strategy is made for writing in the background: it starts a process that imports torch again and
forks writers, 5 to 8 seconds for a small model. Here the same plan is written in place by torch's FileSystemWriter;
the files are the same, and Megatron's own strategy loads them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.actor.optimizer import allocate_state, padding_counted, unshare_steps
from megatron_riskpo.checkpoint.manifest import list_files, sync_to_disk
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.errors import RunError


@dataclass(frozen=True)
class Parts:
    """What is to be written."""

    sharded: dict[str, Any]
    """This rank's tensors and objects, with their places in the whole."""
    common: dict[str, Any]
    """The same on every rank (parameter groups); rank 0 writes it."""
    num_bytes: int
    """Of all ranks' tensors together."""


def _state(actor: Actor, is_loading: bool) -> dict[str, Any]:
    # singleton_local_shards=False: fused tensors (gate and up) are one tensor, cut as the weight itself is.
    metadata: dict[str, Any] = {"singleton_local_shards": False, "dp_cp_group": actor.grid.dp_cp}
    if actor.config.distributed_optimizer:
        # The one kind that other layouts can load: optimizer state in the shapes of the parameters.
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    # Megatron takes AdamW's state for granted, torch makes it at the first step.
    allocate_state(actor.optimizer)
    model = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(actor.chunks)}
    with padding_counted(actor.optimizer):
        optimizer = actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def collect_parts(actor: Actor) -> Parts:
    """Plan a save; collective (a distributed optimizer gathers its state to the first data-parallel rank).

    Call it, and write, inside `actor.optimizer_state()`.
    """
    sharded, common = save_preprocess(_state(actor, is_loading=False))
    own = sum(
        piece.data.numel() * piece.data.element_size()
        for piece in nested_values(sharded)
        if isinstance(piece, ShardedTensor) and piece.data is not None and is_main_replica(piece.replica_id)
    )
    total = torch.tensor([own], dtype=torch.int64, device=actor.grid.device)
    dist.all_reduce(total, group=actor.grid.world)
    return Parts(sharded, common, int(total.item()))


def write_common(folder: Path, parts: Parts) -> None:
    """Rank 0's files, no collective; raises OSError."""
    TorchCommonSaveStrategy("torch", 1).save_common(parts.common, folder)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    for name in list_files(folder):
        sync_to_disk(folder / name)


def write_shards(folder: Path, parts: Parts, grid: RankGrid) -> None:
    """Every rank's tensors, synced to the disk. Collective.

    Raises torch's CheckpointException on every rank if the write fails on one.
    """
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(parts.sharded, keep_only_main_replica=True)
    torch_checkpoint.save(
        mcore_to_pyt_state_dict(by_key),
        storage_writer=torch_checkpoint.FileSystemWriter(folder, thread_count=1, sync_files=True),
        planner=MCoreSavePlanner(flatten_state_dict=False),
        process_group=grid.world,
    )


def load_sharded(folder: Path, actor: Actor) -> None:
    """Fill model and optimizer from what `write_*` wrote, under whatever layout. Collective; raises RunError.

    The format holds pickled plans, so load only what a run of yours has written.
    """
    try:
        loaded = cast(dict[str, Any], dist_checkpointing.load(_state(actor, is_loading=True), str(folder)))
    except (CheckpointingException, CheckpointException, KeyError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunError(f"{folder} does not fit this actor: {reason}; resume with the settings it was saved with, "
                       "or choose another run.name") from error  # fmt: skip
    for index, chunk in enumerate(actor.chunks):
        chunk.load_state_dict(loaded["model"][f"model{index}"])
    actor.optimizer.load_state_dict(loaded["optimizer"])
    unshare_steps(actor.optimizer)
