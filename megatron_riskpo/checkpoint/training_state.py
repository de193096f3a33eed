"""Save and resume a training run: model, optimizer, random numbers, and what the trainer hands over.

    checkpoints/step_N/ megatron/      model and optimizer (torch_dist)
                        rng_R.pt       rank R's random number generators
                        rollouts_R.pt  rank R's rollouts of later steps, where some are under way
                        state.json     steps, the trainer's state, the configuration
                        manifest.json  written last
    checkpoints/latest  names the newest

All functions are collective. The folder must be one that every rank sees.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.checkpoint.manifest import (
    SHARDED,
    DamagedCheckpointError,
    Manifest,
    corrupted_files,
    log_damage,
    read_manifest,
    step_folders,
)
from megatron_riskpo.checkpoint.retention import Retention
from megatron_riskpo.checkpoint.rng import set_rng_state
from megatron_riskpo.checkpoint.sharded import load_sharded
from megatron_riskpo.checkpoint.snapshot import content_of, layout_of, take_snapshot
from megatron_riskpo.checkpoint.together import from_first
from megatron_riskpo.checkpoint.writing import STATE, rng_file, rollouts_file, write_checkpoint
from megatron_riskpo.errors import RunError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole one: its checksums were read."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    def document(self) -> dict[str, Any]:
        """state.json."""
        return json.loads((self.path / STATE).read_text())


def save_checkpoint(
    folder: Path, step: int, actor: Actor, state: dict[str, Any], config: dict[str, Any], retention: Retention,
    metrics: Mapping[str, float] | None = None, rollouts: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write folder/step_N, then delete what `retention` does not keep; returns the checkpoint's folder.

    state: what the trainer needs besides the actor, JSON-able, the same on every rank. config: the resolved
    configuration. metrics: the evaluation's, by which the best checkpoint is kept. rollouts: of this rank, under way,
    as a weights_only load reads them. Raises RunError on every rank if the write fails on one; earlier checkpoints are
    then as they were.
    """
    with actor.optimizer_state():
        snapshot = take_snapshot(step, actor, state, config, metrics or {}, rollouts or {}, detached=False)
        return write_checkpoint(folder, snapshot, retention, actor.grid.world)


def agree_on_latest(folder: Path, group: ProcessGroup) -> Checkpoint | None:
    """The newest whole checkpoint of `folder` (runs/NAME/checkpoints), the same on every rank; None without one.

    Checksums are read, the files split over the ranks. Damaged checkpoints are logged on rank 0.
    """
    names = from_first([path.name for path in step_folders(folder)], group)
    for path in (folder / name for name in names):
        try:
            return Checkpoint(path, _verify(path, group))
        except DamagedCheckpointError as error:
            if group.rank() == 0:
                log_damage(path, str(error))
    return None


def verified_checkpoint(path: Path, group: ProcessGroup) -> Checkpoint:
    """The checkpoint in this folder, its checksums read; raises RunError for a damaged one."""
    try:
        return Checkpoint(path, _verify(path, group))
    except DamagedCheckpointError as error:
        raise RunError(f"checkpoint {path} is damaged: {error}; delete it, and an earlier one is used") from error


def load_checkpoint(checkpoint: Checkpoint, actor: Actor) -> dict[str, Any]:
    """Put the actor and this rank's random numbers where `save_checkpoint` was; returns the trainer's state.

    Raises UsageError for a checkpoint of another model or kind of optimizer.
    """
    path, manifest, grid = checkpoint.path, checkpoint.manifest, actor.grid
    _check_fit(path, manifest.content, content_of(actor))
    with actor.optimizer_state():
        load_sharded(path / SHARDED, actor)
    if manifest.layout == layout_of(actor):
        set_rng_state(torch.load(path / rng_file(grid.rank), weights_only=True))
    elif grid.rank == 0:
        logger.warning(
            "checkpoint %s was saved under the layout %s, this run has %s: weights and optimizer go on, "
            "random number generators start from run.seed",
            *(path, manifest.layout, layout_of(actor)),
        )
    document = checkpoint.document()
    actor.num_optimizer_steps = document["num_optimizer_steps"]
    return document["trainer"]


def load_rollouts(checkpoint: Checkpoint, actor: Actor) -> dict[str, Any]:
    """This rank's rollouts that were under way; none under another layout, whose ranks have other shares of them."""
    file = checkpoint.path / rollouts_file(actor.grid.rank)
    if checkpoint.manifest.layout != layout_of(actor) or not file.is_file():
        return {}
    return torch.load(file, weights_only=True)


def _verify(path: Path, group: ProcessGroup) -> Manifest:
    """The manifest, all sizes and checksums right; DamagedCheckpointError on every rank otherwise."""
    manifest, reason = None, None
    if group.rank() == 0:
        try:
            manifest = read_manifest(path)
        except DamagedCheckpointError as error:
            reason = str(error)
    manifest, reason = from_first((manifest, reason), group)
    if manifest is None:
        raise DamagedCheckpointError(reason)
    reasons: list[list[str]] = [[]] * group.size()
    dist.all_gather_object(reasons, corrupted_files(path, manifest, group.rank(), group.size()), group=group)
    damaged = [reason for share in reasons for reason in share]
    if damaged:
        raise DamagedCheckpointError(damaged[0])
    return manifest


def _check_fit(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    differing = [f"{name} is {saved.get(name)} there, {value} here"
                 for name, value in present.items() if saved.get(name) != value]  # fmt: skip
    if differing:
        raise UsageError(
            f"checkpoint {path} does not fit this run: {', '.join(differing)}; "
            "use the settings it was saved with, or another run.name"
        )
