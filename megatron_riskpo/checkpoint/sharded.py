"""Model and optimizer in Megatron's torch_dist format: each rank writes its part, any layout reads it.

Megatron's own save strategy is made for writing in the background: it starts a process that imports torch again and
forks writers, 5 to 8 seconds for a small model. Here the same plan is written in place by torch's FileSystemWriter;
the files are the same, and Megatron's own strategy loads them.
"""

import copy
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
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.actor.optimizer import allocate_state, hyperparameters_kept, padding_counted, unshare_steps
from megatron_riskpo.checkpoint.manifest import FileEntry, list_files, sync_to_disk
from megatron_riskpo.checkpoint.summed_file import SummingFileSystem
from megatron_riskpo.collector import without_requested_collections
from megatron_riskpo.errors import RunError


@dataclass(frozen=True)
class Parts:
    """What is to be written."""

    sharded: dict[str, Any]
    """This rank's tensors and objects by their names, as torch's writer takes them."""
    common: dict[str, Any]
    """The same on every rank (parameter groups); rank 0 writes it."""
    num_bytes: int
    """Of all ranks' tensors together."""
    is_detached: bool
    """All of it is on the host and apart from what training changes."""


def _state(actor: Actor, is_loading: bool) -> dict[str, Any]:
    # singleton_local_shards=False: fused tensors (gate and up) are one tensor, cut as the weight itself is.
    metadata: dict[str, Any] = {"singleton_local_shards": False, "dp_cp_group": actor.grid.dp_cp}
    if actor.config.distributed_optimizer:
        # The one kind that other layouts can load: optimizer state in the shapes of the parameters.
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    # Megatron takes AdamW's state for granted, torch makes it at the first step.
    allocate_state(actor.optimizer)
    model = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(actor.chunks)}
    # Megatron collects garbage after it has gathered an optimizer's state, for programs without a collector: tenths of
    # a second, all training standing still.
    with padding_counted(actor.optimizer), without_requested_collections():
        optimizer = actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def collect_parts(actor: Actor, *, detached: bool) -> Parts:
    """Plan a save; collective (a distributed optimizer gathers its state to the first data-parallel rank).

    Call it inside `actor.optimizer_state()`. Detached parts may be written while training goes on; others are views of
    the actor's tensors, to be written before the body ends.
    """
    sharded, common = cast(tuple[dict[str, Any], dict[str, Any]], save_preprocess(_state(actor, is_loading=False)))
    if detached:
        common = copy.deepcopy(common)
        # A distributed optimizer's state was gathered into tensors of its own.
        live = ["model"] if actor.config.distributed_optimizer else ["model", "optimizer"]
        for piece in _own_tensors({name: sharded[name] for name in live}):
            piece.data = _host_copy(piece.data)
    own = sum(piece.data.numel() * piece.data.element_size() for piece in _own_tensors(sharded))
    total = torch.tensor([own], dtype=torch.int64, device=actor.grid.device)
    dist.all_reduce(total, group=actor.grid.world)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    return Parts(mcore_to_pyt_state_dict(by_key), common, int(total.item()), detached)


def _own_tensors(sharded: dict[str, Any]) -> list[ShardedTensor]:
    """Those that this rank writes: of equal ones on several ranks one does."""
    return [
        piece
        for piece in nested_values(sharded)
        if isinstance(piece, ShardedTensor) and piece.data is not None and is_main_replica(piece.replica_id)
    ]


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    # Page-locked where there is a GPU: pageable memory is several times slower to copy.
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def write_common(folder: Path, parts: Parts) -> None:
    """Rank 0's files, no collective; raises OSError."""
    TorchCommonSaveStrategy("torch", 1).save_common(parts.common, folder)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    for name in list_files(folder):
        sync_to_disk(folder / name)


def write_shards(folder: Path, parts: Parts, group: ProcessGroup) -> dict[str, FileEntry]:
    """Every rank's tensors, synced to the disk; this rank's files, with the checksums of the bytes that went into
    them. Collective over `group`, all ranks of the actor.

    Raises torch's CheckpointException on every rank if the write fails on one.
    """
    # Copying ahead is for tensors on a GPU: it would open one in a thread that has none.
    ahead = {"per_thread_copy_ahead": 0} if parts.is_detached else {}
    writer = torch_checkpoint.FileSystemWriter(folder, thread_count=1, sync_files=True, **ahead)
    writer.fs = files = SummingFileSystem()
    torch_checkpoint.save(
        parts.sharded,
        storage_writer=writer,
        planner=MCoreSavePlanner(flatten_state_dict=False),
        process_group=group,
    )
    return {name: entry for name, entry in files.entries.items() if name.endswith(DEFAULT_SUFFIX)}


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
    with hyperparameters_kept(actor.optimizer):
        actor.optimizer.load_state_dict(loaded["optimizer"])
    unshare_steps(actor.optimizer)
