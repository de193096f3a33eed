"""Save and resume a training run: model, optimizer, random numbers, and what the trainer hands over.

    checkpoints/step_N/ megatron/      model and optimizer (torch_dist)
                        rng_R.pt       rank R's random number generators
                        state.json     steps, the trainer's state
                        manifest.json  written last
    checkpoints/latest  names the newest

All functions are collective. The folder must be one that every rank sees.
"""

import errno
import io
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.checkpoint.manifest import (
    PARTIAL_SUFFIX,
    SHARDED,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
    clear_leftovers,
    corrupted_files,
    describe_file,
    list_files,
    log_damage,
    publish,
    read_manifest,
    step_folders,
    sync_to_disk,
    write_manifest,
    write_text_durably,
)
from megatron_riskpo.checkpoint.retention import Retention, remove_old
from megatron_riskpo.checkpoint.rng import rng_state, set_rng_state
from megatron_riskpo.checkpoint.sharded import Parts, collect_parts, load_sharded, write_common, write_shards
from megatron_riskpo.checkpoint.together import GroupFailureError, run_together
from megatron_riskpo.errors import RunError, UsageError

logger = logging.getLogger(__name__)

STATE = "state.json"
PACKAGES = ("megatron-riskpo", "megatron-core", "torch", "transformers")


def save_checkpoint(
    folder: Path, step: int, actor: Actor, state: dict[str, Any], retention: Retention,
    metrics: Mapping[str, float] | None = None,
) -> Path:  # fmt: skip
    """Write folder/step_N, then delete what `retention` does not keep; returns the checkpoint's folder.

    state: what the trainer needs besides the actor, JSON-able, the same on every rank. metrics: the evaluation's, by
    which the best checkpoint is kept. Raises RunError on every rank if the write fails on one; earlier checkpoints are
    then as they were.
    """
    document = json.dumps({"step": step, "num_optimizer_steps": actor.num_optimizer_steps, "trainer": state})
    partial = folder / f"step_{step}{PARTIAL_SUFFIX}"
    with actor.optimizer_state():
        return _save(partial, document, step, actor, retention, dict(metrics or {}))


def _save(
    partial: Path, document: str, step: int, actor: Actor, retention: Retention, metrics: dict[str, float]
) -> Path:
    parts = collect_parts(actor)
    try:
        _write_parts(partial, parts, document, actor)
        _seal(partial, step, actor, metrics)
        return run_together(actor.grid.world, lambda: _publish(partial, step, retention, actor.grid.rank == 0))
    except GroupFailureError as error:
        raise _save_error(partial, parts, error, actor.grid.world) from error


def agree_on_latest(folder: Path, group: ProcessGroup) -> Path | None:
    """The newest whole checkpoint of `folder` (runs/NAME/checkpoints), the same on every rank; None without one.

    Checksums are read, the files split over the ranks. Damaged checkpoints are logged on rank 0.
    """
    names = _from_first([path.name for path in step_folders(folder)], group)
    for path in (folder / name for name in names):
        try:
            _verify(path, group)
            return path
        except DamagedCheckpointError as error:
            if group.rank() == 0:
                log_damage(path, str(error))
    return None


def load_checkpoint(path: Path, actor: Actor) -> dict[str, Any]:
    """Put the actor and this rank's random numbers where `save_checkpoint` was; returns the trainer's state.

    Raises RunError for a damaged checkpoint, UsageError for one of another model or kind of optimizer.
    """
    grid = actor.grid
    try:
        manifest = _verify(path, grid.world)
    except DamagedCheckpointError as error:
        raise RunError(f"checkpoint {path} is damaged: {error}; delete it, and an earlier one is used") from error
    _check_fit(path, manifest.content, _content(actor))
    with actor.optimizer_state():
        load_sharded(path / SHARDED, actor)
    if manifest.layout == _layout(actor):
        set_rng_state(torch.load(path / f"rng_{grid.rank}.pt", weights_only=True))
    elif grid.rank == 0:
        logger.warning(
            "checkpoint %s was saved under the layout %s, this run has %s: weights and optimizer go on, "
            "random number generators start from run.seed",
            *(path, manifest.layout, _layout(actor)),
        )
    document = json.loads((path / STATE).read_text())
    actor.num_optimizer_steps = document["num_optimizer_steps"]
    return document["trainer"]


def _write_parts(partial: Path, parts: Parts, document: str, actor: Actor) -> None:
    """Everything but the manifest."""
    group, is_first = actor.grid.world, actor.grid.rank == 0
    sharded = partial / SHARDED

    def prepare() -> None:
        if is_first:
            sharded.parent.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(partial.parent)
            sharded.mkdir(parents=True)

    def write_own() -> None:
        rng_file = partial / f"rng_{group.rank()}.pt"
        # Not torch.save to the path: its C++ writer would hide which error of the system stopped it.
        content = io.BytesIO()
        torch.save(rng_state(), content)
        rng_file.write_bytes(content.getbuffer())
        sync_to_disk(rng_file)
        if is_first:
            write_text_durably(partial / STATE, document)
            write_common(sharded, parts)

    run_together(group, prepare)
    run_together(group, write_own)
    run_together(group, lambda: write_shards(sharded, parts, actor.grid))


def _seal(partial: Path, step: int, actor: Actor, metrics: dict[str, float]) -> None:
    """Write the manifest; each rank reads back and sums its share of the files."""
    group = actor.grid.world
    names = _from_first(list_files(partial), group)

    def describe_share() -> dict[str, FileEntry]:
        return {name: describe_file(partial / name) for name in names[group.rank() :: group.size()]}

    shares: list[dict[str, FileEntry]] = [{}] * group.size()
    dist.all_gather_object(shares, run_together(group, describe_share), group=group)
    files = {name: entry for share in shares for name, entry in share.items()}

    def write() -> None:
        if group.rank() == 0:
            sync_to_disk(partial / SHARDED)
            write_manifest(partial, Manifest(step, _layout(actor), _content(actor), _versions(), files, metrics))

    run_together(group, write)


def _publish(partial: Path, step: int, retention: Retention, is_first: bool) -> Path:
    if is_first:
        publish(partial)
        remove_old(partial.parent, step, retention)
    return partial.with_name(f"step_{step}")


def _save_error(partial: Path, parts: Parts, error: GroupFailureError, group: ProcessGroup) -> RunError:
    """The line for the user; the unfinished folder goes, its space may be what the run needs to end cleanly."""
    if group.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    place = next(path for path in (partial.parent, *partial.parent.absolute().parents) if path.is_dir())
    free = _from_first(shutil.disk_usage(place).free, group)
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


def _verify(path: Path, group: ProcessGroup) -> Manifest:
    """The manifest, all sizes and checksums right; DamagedCheckpointError on every rank otherwise."""
    manifest, reason = None, None
    if group.rank() == 0:
        try:
            manifest = read_manifest(path)
        except DamagedCheckpointError as error:
            reason = str(error)
    manifest, reason = _from_first((manifest, reason), group)
    if manifest is None:
        raise DamagedCheckpointError(reason)
    reasons: list[list[str]] = [[]] * group.size()
    dist.all_gather_object(reasons, corrupted_files(path, manifest, group.rank(), group.size()), group=group)
    damaged = [reason for share in reasons for reason in share]
    if damaged:
        raise DamagedCheckpointError(damaged[0])
    return manifest


def _from_first(value: Any, group: ProcessGroup) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def _layout(actor: Actor) -> dict[str, int]:
    sizes = {name: getattr(actor.config, name) for name in ("tp", "pp", "vp", "cp", "ep")}
    return sizes | {"dp": actor.grid.dp.size()}


def _content(actor: Actor) -> dict[str, Any]:
    transformer = actor.chunks[0].config
    return asdict(actor.shape) | {
        "hidden_size": transformer.hidden_size,
        "intermediate_size": transformer.ffn_hidden_size,
        "dtype": str(transformer.params_dtype).removeprefix("torch."),
        "distributed_optimizer": actor.config.distributed_optimizer,
    }


def _check_fit(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    differing = [f"{name} is {saved.get(name)} there, {value} here"
                 for name, value in present.items() if saved.get(name) != value]  # fmt: skip
    if differing:
        raise UsageError(
            f"checkpoint {path} does not fit this run: {', '.join(differing)}; "
            "use the settings it was saved with, or another run.name"
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
