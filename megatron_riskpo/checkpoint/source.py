"""Which checkpoint a conversion reads, whether it is whole, and of which model it is."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_riskpo.checkpoint.manifest import (
    MANIFEST,
    SHARDED,
    DamagedCheckpointError,
    corrupted_files,
    log_damage,
    read_manifest,
    step_folders,
)
from megatron_riskpo.checkpoint.team import Team
from megatron_riskpo.checkpoint.torch_dist import INDEX_FILE
from megatron_riskpo.checkpoint.weight_map import shape_of
from megatron_riskpo.config_io import RUN_RECORD
from megatron_riskpo.errors import RunError, UsageError

CHECKPOINTS = "checkpoints"
CARRIED = "hf"
"""In a converted checkpoint: the model folder's config.json, tokenizer and the like."""
_NUM_THREADS = 2
"""That read checksums; a process's."""


def find_checkpoint(path: Path, step: int | None, team: Team) -> Path:
    """The step_N folder that is meant, whole by its checksums: `path` itself, or of the run's folder `path` step N or
    the newest whole one. A bare torch_dist folder is given back unchecked. Collective: every process reads a share.

    Raises UsageError for a wrong path, RunError for a damaged checkpoint.
    """
    candidates, has_choice = team.first(lambda: _candidates(path, step))
    for candidate in candidates:
        reason = _damage(candidate, team)
        if reason is None:
            return candidate
        if not has_choice:
            raise RunError(f"checkpoint {candidate} is damaged: {reason}; take another step")
        if team.rank == 0:
            log_damage(candidate, reason)
    raise UsageError(f"{path / CHECKPOINTS} has no whole checkpoint; train further, or give another run")


def _candidates(path: Path, step: int | None) -> tuple[list[Path], bool]:
    """Folders, the first whole one of which is meant, and whether any may be passed over."""
    folder = path / CHECKPOINTS
    if folder.is_dir():
        return _of_run(folder, step)
    if step is not None:
        raise UsageError(f"--step {step}: {path} has no folder {CHECKPOINTS}, so it is no run; leave --step out")
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give a run's folder, or one {CHECKPOINTS}/step_N of it")
    if not any((path / name).exists() for name in (SHARDED, MANIFEST, INDEX_FILE)):
        raise UsageError(f"{path} is neither a run nor a checkpoint: it has no {CHECKPOINTS}, {MANIFEST} or "
                         f"{INDEX_FILE}; give a run's folder, or one {CHECKPOINTS}/step_N of it")  # fmt: skip
    return [path], False


def _of_run(folder: Path, step: int | None) -> tuple[list[Path], bool]:
    if step is None:
        return step_folders(folder), True
    path = folder / f"step_{step}"
    if not path.is_dir():
        steps = ", ".join(found.name.removeprefix("step_") for found in reversed(step_folders(folder))) or "none"
        raise UsageError(f"--step {step}: {folder} has no step_{step}; its steps are: {steps}")
    return [path], False


def _damage(path: Path, team: Team) -> str | None:
    """The first reason why the checkpoint is not whole, all checksums read; a bare torch_dist folder has none."""
    num_shares = team.size * _NUM_THREADS

    def own() -> list[str]:
        if (path / INDEX_FILE).is_file() and not (path / MANIFEST).is_file():
            return []
        try:
            manifest = read_manifest(path)
        except DamagedCheckpointError as error:
            return [str(error)]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            shares = range(team.rank, num_shares, team.size)
            found = pool.map(lambda share: corrupted_files(path, manifest, share, num_shares), shares)
            return [reason for reasons in found for reason in reasons]

    return next((reason for reasons in team.gather(own) for reason in reasons), None)


def model_folder(checkpoint: Path) -> Path:
    """The model folder that belongs to the checkpoint: carried along by a conversion, or the one that the checkpoint's
    run started from, as the run's record names it. Raises UsageError."""
    if (checkpoint / CARRIED / "config.json").is_file():
        return checkpoint / CARRIED
    record = checkpoint.absolute().parent.parent / RUN_RECORD
    remedy = "name the model folder that the run started from by --model DIR"
    try:
        path = Path(json.loads(record.read_text(encoding="utf-8"))["config"]["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{record} does not say what model was trained ({type(error).__name__}); {remedy}") from error
    if not path.is_dir():
        raise UsageError(f"{record}: model.path = {path} is no folder seen from {Path.cwd()}; {remedy}")
    return path


def check_content(checkpoint: Path, hf_config: Mapping[str, Any]) -> None:
    """Raise UsageError if the manifest, where there is one, says that the checkpoint is of another model."""
    if not (checkpoint / MANIFEST).is_file():
        return
    try:
        content = read_manifest(checkpoint).content
    except DamagedCheckpointError as error:
        raise RunError(f"checkpoint {checkpoint} is damaged: {error}; take another step") from error
    wanted = asdict(shape_of(hf_config))
    differing = [f"{name} is {content[name]} there, {value} in config.json"
                 for name, value in wanted.items() if content.get(name, value) != value]  # fmt: skip
    if differing:
        raise UsageError(f"checkpoint {checkpoint} is of another model: {', '.join(differing)}; "
                         "name the model folder that the run started from by --model DIR")  # fmt: skip
