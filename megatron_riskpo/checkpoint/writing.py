"""From a snapshot to a whole checkpoint on the disk. Needs neither the actor nor its process groups: a thread of its
own may do it while training goes on."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_riskpo.checkpoint.manifest import (
    PARTIAL_SUFFIX,
    SHARDED,
    FileEntry,
    clear_leftovers,
    describe_file,
    list_files,
    publish,
    sync_to_disk,
    write_manifest,
    write_text_durably,
)
from megatron_riskpo.checkpoint.retention import Retention, remove_old
from megatron_riskpo.checkpoint.sharded import Parts, write_common, write_shards
from megatron_riskpo.checkpoint.snapshot import Snapshot
from megatron_riskpo.checkpoint.together import GroupFailureError, from_first, run_together
from megatron_riskpo.distributed.job import report_progress
from megatron_riskpo.errors import RunError

STATE = "state.json"


def write_checkpoint(folder: Path, snapshot: Snapshot, retention: Retention, group: ProcessGroup) -> Path:
    """Write folder/step_N, then delete what `retention` does not keep; returns the checkpoint's folder.

    Collective over `group`, all ranks of the actor. Raises RunError on every rank if the write fails on one; earlier
    checkpoints are then as they were.
    """
    partial = folder / f"step_{snapshot.manifest.step}{PARTIAL_SUFFIX}"
    try:
        files = _write_files(partial, snapshot, group)
        return run_together(group, lambda: _finish(partial, snapshot, files, retention, group.rank() == 0))
    except GroupFailureError as error:
        raise _save_error(partial, snapshot.parts, error, group) from error


def rng_file(rank: int) -> str:
    """The file of a rank's random number generators."""
    return f"rng_{rank}.pt"


def rollouts_file(rank: int) -> str:
    """The file of a rank's rollouts under way, where there are any."""
    return f"rollouts_{rank}.pt"


def _write_files(partial: Path, snapshot: Snapshot, group: ProcessGroup) -> dict[str, FileEntry]:
    """All files but the manifest; those of every rank that were summed while they were written."""
    is_first, sharded = group.rank() == 0, partial / SHARDED

    def prepare() -> None:
        if is_first:
            partial.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(partial.parent)
            sharded.mkdir(parents=True)

    def write_own() -> dict[str, FileEntry]:
        own = {rng_file(group.rank()): snapshot.rng, rollouts_file(group.rank()): snapshot.rollouts}
        own = {name: content for name, content in own.items() if content}
        for name, content in own.items():
            (partial / name).write_bytes(content)
            sync_to_disk(partial / name)
        if is_first:
            write_text_durably(partial / STATE, snapshot.document)
            write_common(sharded, snapshot.parts)
        return {name: describe_file(partial / name) for name in own}

    run_together(group, prepare)
    files = run_together(group, write_own)
    shards = run_together(group, lambda: write_shards(sharded, snapshot.parts, group))
    files |= {f"{SHARDED}/{name}": entry for name, entry in shards.items()}
    of_ranks: list[dict[str, FileEntry]] = [{}] * group.size()
    dist.all_gather_object(of_ranks, files, group=group)
    return {name: entry for files in of_ranks for name, entry in files.items()}


def _finish(
    partial: Path, snapshot: Snapshot, files: dict[str, FileEntry], retention: Retention, is_first: bool
) -> Path:
    """Rank 0: sum its small files, write the manifest, rename, delete what is old."""
    if is_first:
        # torch syncs its index before the last of it has left Python's buffer.
        sync_to_disk(partial / SHARDED / ".metadata")
        sync_to_disk(partial / SHARDED)
        others = {name: describe_file(partial / name) for name in list_files(partial) if name not in files}
        write_manifest(partial, replace(snapshot.manifest, files=files | others))
        publish(partial)
        report_progress()
        remove_old(partial.parent, snapshot.manifest.step, retention)
    return partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))


def _save_error(partial: Path, parts: Parts, error: GroupFailureError, group: ProcessGroup) -> RunError:
    """The line for the user; the unfinished folder goes, its space may be what the run needs to end cleanly."""
    if group.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    place = next(path for path in (partial.parent, *partial.parent.absolute().parents) if path.is_dir())
    free = from_first(shutil.disk_usage(place).free, group)
    failure = error.first
    reason = failure.reason
    if failure.is_unnamed_io and free < parts.num_bytes:
        reason = os.strerror(errno.ENOSPC)
    what = f"checkpoint {partial.name.removesuffix(PARTIAL_SUFFIX)} could not be written to {partial.parent}"
    why = f"{reason} (rank {failure.rank}); earlier checkpoints are intact"
    if failure.is_io:
        numbers = f"it needs about {parts.num_bytes / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free"
        return RunError(f"{what}: {why}; {numbers}; free space or set run.dir to another disk")
    return RunError(f"{what}: {why}; --debug shows where")
