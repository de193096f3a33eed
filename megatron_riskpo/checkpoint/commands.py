"""`riskpo checkpoint ls | verify | prune`: which checkpoints a run has, whether they are whole, and deleting old ones.

Reads manifests, bytes and the run's record. Imports neither torch nor Megatron, and unpickles nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from megatron_riskpo.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    PARTIAL_SUFFIX,
    Found,
    damages,
    list_files,
    remove_checkpoint,
    survey,
)
from megatron_riskpo.checkpoint.retention import Retention, best_step, outdated
from megatron_riskpo.errors import RunError, UsageError

HEADER = ("step", "size", "layout", "state", "saved", "options", "")


def list_checkpoints(run_dir: Path) -> int:
    """Print a table of the run's checkpoints, by manifests and sizes; returns the exit code.

    Raises UsageError without checkpoints.
    """
    found = _survey(run_dir)
    latest, retention = _latest(run_dir), _recorded_retention(run_dir)
    metrics = {one.step: one.manifest.metrics for one in found if one.manifest is not None}
    best = best_step(metrics, retention.keep_best) if retention is not None else None
    rows = [HEADER]
    for one in found:
        # A run deletes old ones meanwhile.
        if not one.path.exists():
            continue
        marks = {"latest": one.path == latest, "best": one.step == best, one.damage: bool(one.damage)}
        rows.append((*_described(one), "; ".join(mark for mark, holds in marks.items() if holds)))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for path in sorted(_folder(run_dir).glob(f"step_*{PARTIAL_SUFFIX}")):
        print(f"{path.name}: being written or deleted, or left over by a kill (the next save removes it)")
    return 0


def verify_checkpoints(run_dir: Path, step: int | None) -> int:
    """Read all checksums, of one step or of all, and print every damaged file; the exit code is 1 if there is one.

    Raises UsageError without such checkpoints.
    """
    found = _survey(run_dir)
    chosen = [one for one in found if step is None or one.step == step]
    if not chosen:
        steps = ", ".join(str(one.step) for one in found)
        raise UsageError(f"{run_dir} has no checkpoint of step {step}; it has steps {steps}")
    num_damaged = num_gone = 0
    for one in chosen:
        reasons = damages(one.path)
        if reasons and not one.path.exists():
            num_gone, reasons = num_gone + 1, ["deleted meanwhile, by its run or by prune"]
        else:
            num_damaged += bool(reasons)
        # Flushed: the next one may take minutes.
        for reason in reasons or ["whole"]:
            print(f"{one.path.name}: {reason}", flush=True)
    num_left = len(chosen) - num_gone
    print(f"{num_damaged} of {num_left} damaged" if num_damaged else f"all {num_left} whole, checksums read")
    return 1 if num_damaged else 0


def prune_checkpoints(run_dir: Path, keep: int, dry_run: bool) -> int:
    """Delete what is older than the newest `keep` whole checkpoints, oldest first; returns the exit code.

    Spared are the newest that verifies, the one that `latest` names, and what the run's checkpoint.keep_every and
    keep_best keep. Raises UsageError without checkpoints or the run's record, RunError where none verifies.
    """
    if keep < 1:
        raise UsageError(f"--keep {keep} is out of range; it must be >= 1")
    found, recorded = _survey(run_dir), _recorded_retention(run_dir)
    if recorded is None:
        raise UsageError(
            f"{run_dir / 'config.json'} does not say which checkpoints the run keeps (checkpoint.keep_every, "
            "keep_best); restore the file, or delete folders by hand"
        )
    paths = outdated(found, replace(recorded, keep=keep))
    # Checksums are read only where there is something to lose.
    spared = {_latest(run_dir), _newest_verified(found)} if paths else set()
    freed = num_deleted = 0
    for path in paths:
        if path in spared:
            continue
        size = _bytes_on_disk(path)
        if not dry_run:
            remove_checkpoint(path)
        print(f"{'would delete' if dry_run else 'deleted'} {path.name} ({_readable(size)})", flush=True)
        freed += size
        num_deleted += 1
    verb = "would free" if dry_run else "freed"
    print(f"{verb} {_readable(freed)}, which leaves {len(found) - num_deleted} of {len(found)} checkpoints")
    return 0


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _survey(run_dir: Path) -> list[Found]:
    found = survey(_folder(run_dir))
    if not found:
        what = "has no checkpoints" if run_dir.is_dir() else "is no folder"
        raise UsageError(f"{run_dir} {what}: name the folder of a run that `riskpo train` wrote (runs/NAME)")
    return found


def _latest(run_dir: Path) -> Path | None:
    """The folder that `latest` names."""
    try:
        return _folder(run_dir) / (_folder(run_dir) / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _recorded_retention(run_dir: Path) -> Retention | None:
    """What the run itself keeps, by the record of its last start; None if that cannot be read."""
    # Not through config_io: it takes seconds to import.
    try:
        options = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["config"]["checkpoint"]
        # Records of earlier versions lack both.
        return Retention(keep_every=int(options.get("keep_every", 0)), keep_best=str(options.get("keep_best", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _newest_verified(found: Sequence[Found]) -> Path:
    for one in reversed(found):
        reasons = damages(one.path)
        if not reasons:
            return one.path
        print(f"{one.path.name} is damaged: {reasons[0]}")
    raise RunError(f"none of the {len(found)} checkpoints verifies; nothing was deleted")


def _described(one: Found) -> tuple[str, ...]:
    """Step, size, layout, state, date and options (the start of their hash), as the table shows them."""
    manifest_file = one.path / MANIFEST
    changed = (manifest_file if manifest_file.is_file() else one.path).stat().st_mtime
    date = datetime.fromtimestamp(changed).strftime("%Y-%m-%d %H:%M")
    if one.manifest is None:
        return str(one.step), _readable(_bytes_on_disk(one.path)), "-", "damaged", date, "-"
    sizes = [f"{name}{size}" for name, size in one.manifest.layout.items() if size != 1]
    layout, options = " ".join(sizes) or "1 rank", one.manifest.config_hash[:8] or "-"
    return str(one.step), _readable(one.manifest.num_bytes), layout, "complete", date, options


def _bytes_on_disk(path: Path) -> int:
    return sum((path / name).stat().st_size for name in list_files(path))


def _readable(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"
