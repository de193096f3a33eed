"""Which checkpoint folders of a run are whole.

A checkpoint is a folder step_N. It is built as step_N.partial; its manifest, written last, lists every file with
size and checksum; then the folder is renamed, and the file `latest` names it. So a folder without a manifest, or with
a file that is not as listed, is damaged, whatever ended its writer.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
SHARDED = "megatron"
"""The folder of model and optimizer within a checkpoint."""
PARTIAL_SUFFIX = ".partial"
FORMAT = 1


def partial_of(target: Path) -> Path:
    """Where a folder is built that appears as `target` when it is whole."""
    return target.absolute().with_name(target.absolute().name + PARTIAL_SUFFIX)


class DamagedCheckpointError(Exception):
    """The folder is no whole checkpoint; the message says why, without the folder's name."""


@dataclass(frozen=True)
class FileEntry:
    """What a file has to be."""

    size: int
    """Bytes."""
    blake2b: str
    """Hex digest of 16 bytes."""


@dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint."""

    step: int
    layout: dict[str, int]
    """tp, pp, vp, cp, ep, etp and dp sizes of the ranks that wrote it."""
    content: dict[str, Any]
    """Model sizes, dtype and kind of optimizer: what the actor that loads it must share."""
    versions: dict[str, str]
    """Packages that wrote it."""
    files: dict[str, FileEntry]
    """By name relative to the folder."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The evaluation's, where the step was evaluated; manifests of earlier versions have none."""
    config_hash: str = ""
    """Of the resolved configuration that it was made under; empty in manifests of earlier versions."""

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())


def sync_to_disk(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush all that is in a folder to the disk."""
    for path in [folder, *folder.rglob("*")]:
        sync_to_disk(path)


def write_text_durably(path: Path, text: str) -> None:
    """The file has the old text or the new one, never a part, also after a loss of power."""
    building = path.with_name(path.name + ".tmp")
    building.write_text(text)
    sync_to_disk(building)
    building.replace(path)
    sync_to_disk(path.parent)


def new_digest() -> "hashlib.blake2b":
    """What FileEntry.blake2b is the hex digest of."""
    return hashlib.blake2b(digest_size=16)


def describe_file(path: Path) -> FileEntry:
    """Size and checksum of a file; raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, new_digest)
        return FileEntry(file.tell(), digest.hexdigest())


def list_files(folder: Path) -> list[str]:
    """Names of all files below folder, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_text_durably(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest, and every file there with its listed size (checksums: see `corrupted_files`).

    Raises DamagedCheckpointError.
    """
    manifest = parse_manifest(folder)
    for name, entry in manifest.files.items():
        reason = _misfit(folder, name, entry)
        if reason:
            raise DamagedCheckpointError(reason)
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """The manifest alone, whatever has become of the files; raises DamagedCheckpointError."""
    try:
        return _parse(json.loads((folder / MANIFEST).read_text()))
    except FileNotFoundError:
        raise DamagedCheckpointError(f"no {MANIFEST}: it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} is not readable ({type(error).__name__}: {error})") from error


def damages(folder: Path) -> list[str]:
    """Reasons, one for each damaged file of the checkpoint, all checksums read; none if it is whole."""
    try:
        manifest = parse_manifest(folder)
    except DamagedCheckpointError as error:
        return [str(error)]
    misfits = {name: _misfit(folder, name, entry) for name, entry in manifest.files.items()}
    # Of a file whose size is wrong already a checksum says no more.
    fitting = {name: entry for name, entry in manifest.files.items() if misfits[name] is None}
    return [reason for reason in misfits.values() if reason] + corrupted_files(folder, replace(manifest, files=fitting))


def _misfit(folder: Path, name: str, entry: FileEntry) -> str | None:
    """Why the file cannot be the one that was written, by its size alone."""
    try:
        status = (folder / name).stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return f"{name}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is no file"
    if status.st_size != entry.size:
        return f"{name} has {status.st_size} bytes, the manifest says {entry.size}"
    return None


def _parse(document: dict[str, Any]) -> Manifest:
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']}, this version reads {FORMAT}")
    files = {name: FileEntry(**entry) for name, entry in document["files"].items()}
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"file name {name!r} points out of the folder")
    return Manifest(
        step=int(document["step"]),
        # Earlier versions split no expert.
        layout={"etp": 1} | document["layout"],
        content=dict(document["content"]),
        versions=dict(document["versions"]),
        files=files,
        metrics={name: float(value) for name, value in document.get("metrics", {}).items()},
        config_hash=str(document.get("config_hash", "")),
    )


def corrupted_files(folder: Path, manifest: Manifest, share: int = 0, num_shares: int = 1) -> list[str]:
    """Reasons, for the files of this share (every num_shares-th) whose bytes are not the ones that were written."""
    reasons = []
    for name in sorted(manifest.files)[share::num_shares]:
        try:
            found = describe_file(folder / name)
        except OSError as error:
            reasons.append(f"{name}: {error.strerror}")
            continue
        if found != manifest.files[name]:
            reasons.append(f"{name} has another checksum than the manifest says")
    return reasons


def step_of(folder: Path) -> int | None:
    """N of a folder named step_N; None for other names."""
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match[1]) if match else None


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, whole or not, newest step first."""
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted((path for path in found if step_of(path) is not None), key=lambda path: -(step_of(path) or 0))


@dataclass(frozen=True)
class Found:
    """A checkpoint folder, and what its manifest and the sizes of its files say."""

    path: Path
    step: int
    manifest: Manifest | None
    """None if it is damaged."""
    damage: str = ""
    """Why, if it is."""


def survey(folder: Path) -> list[Found]:
    """All checkpoint folders of `folder` (runs/NAME/checkpoints), oldest step first; checksums are not read."""
    return [_find(path) for path in reversed(step_folders(folder))]


def _find(path: Path) -> Found:
    step = step_of(path) or 0
    try:
        return Found(path, step, read_manifest(path))
    except DamagedCheckpointError as error:
        return Found(path, step, None, str(error))


def latest_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint of `folder` (runs/NAME/checkpoints), all checksums read; damaged ones are logged."""
    for path in step_folders(folder):
        reasons = damages(path)
        if not reasons:
            return path
        log_damage(path, reasons[0])
    return None


def log_damage(path: Path, reason: str) -> None:
    logger.warning("checkpoint %s is damaged and not used: %s", path, reason)


def clear_leftovers(folder: Path) -> None:
    """Remove what writers and deletions that were killed left behind."""
    for path in folder.glob(f"step_*{PARTIAL_SUFFIX}"):
        _remove_tree(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint's folder, which is whole until it is gone. A run and `riskpo checkpoint prune` may both be at
    it."""
    removed = path.with_name(f"{path.name}.removed{PARTIAL_SUFFIX}")
    _remove_tree(removed)
    with contextlib.suppress(FileNotFoundError):
        path.rename(removed)
    _remove_tree(removed)


def _remove_tree(path: Path) -> None:
    def unless_gone(_function: Any, _path: str, caught: tuple[type, BaseException, Any]) -> None:
        if not isinstance(caught[1], FileNotFoundError):
            raise caught[1]

    shutil.rmtree(path, onerror=unless_gone)


def publish(partial: Path) -> Path:
    """Turn a finished step_N.partial into step_N, and let `latest` name it; returns the new folder."""
    target = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
    if target.exists():
        # Saved again, or damaged: a folder cannot be renamed onto one that holds files.
        replaced = partial.with_name(f"{target.name}.replaced{PARTIAL_SUFFIX}")
        target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced)
    else:
        partial.rename(target)
    sync_to_disk(target.parent)
    write_text_durably(target.parent / LATEST, target.name + "\n")
    return target
