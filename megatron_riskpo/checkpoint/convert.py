"""From a training checkpoint to Hugging Face tensors, one Megatron parameter in memory at a time.

One process, no process groups, no model: the files say under which layout they were written, and are read by slices.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.checkpoint.manifest import (
    MANIFEST,
    SHARDED,
    DamagedCheckpointError,
    damages,
    latest_complete,
    read_manifest,
    step_folders,
)
from megatron_riskpo.checkpoint.torch_dist import INDEX_FILE, TorchDistReader
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.checkpoint.weight_map.base import ModelShape, Rule
from megatron_riskpo.checkpoint.weight_map.shapes import Shape, hf_shapes
from megatron_riskpo.checkpoint.weight_map.stored import stored_counts, stored_index, stored_keys
from megatron_riskpo.config_io import RUN_RECORD
from megatron_riskpo.errors import RunError, UsageError

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class _Item:
    """One Megatron parameter of the whole model."""

    rule: Rule
    key: str
    at: tuple[int, ...]
    shapes: list[Shape]


def find_checkpoint(path: Path, step: int | None) -> Path:
    """The step_N folder that is meant, whole by its checksums: `path` itself, or of the run's folder `path` step N or
    the newest whole one. A bare torch_dist folder is given back unchecked.

    Raises UsageError for a wrong path, RunError for a damaged checkpoint.
    """
    folder = path / CHECKPOINTS
    if folder.is_dir():
        return _of_run(folder, step)
    if step is not None:
        raise UsageError(f"--step {step}: {path} has no folder {CHECKPOINTS}, so it is no run; leave --step out")
    if (path / INDEX_FILE).is_file() and not (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give a run's folder, or one {CHECKPOINTS}/step_N of it")
    if not (path / SHARDED).is_dir() and not (path / MANIFEST).is_file():
        raise UsageError(f"{path} is neither a run nor a checkpoint: it has no {CHECKPOINTS}, {MANIFEST} or "
                         f"{INDEX_FILE}; give a run's folder, or one {CHECKPOINTS}/step_N of it")  # fmt: skip
    return _whole(path)


def _of_run(folder: Path, step: int | None) -> Path:
    if step is None:
        newest = latest_complete(folder)
        if newest is None:
            raise UsageError(f"{folder} has no whole checkpoint; train further, or give another run")
        return newest
    path = folder / f"step_{step}"
    if not path.is_dir():
        steps = ", ".join(found.name.removeprefix("step_") for found in reversed(step_folders(folder))) or "none"
        raise UsageError(f"--step {step}: {folder} has no step_{step}; its steps are: {steps}")
    return _whole(path)


def _whole(path: Path) -> Path:
    reasons = damages(path)
    if reasons:
        raise RunError(f"checkpoint {path} is damaged: {reasons[0]}; take another step")
    return path


def model_folder(checkpoint: Path) -> Path:
    """The model folder that the checkpoint's run started from, as the run's record names it. Raises UsageError."""
    record = checkpoint.absolute().parent.parent / RUN_RECORD
    remedy = "name the model folder that the run started from by --model DIR"
    try:
        path = Path(json.loads(record.read_text(encoding="utf-8"))["config"]["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{record} does not say what model was trained ({type(error).__name__}); {remedy}") from error
    if not path.is_dir():
        raise UsageError(f"{record}: model.path = {path} is no folder seen from {Path.cwd()}; {remedy}")
    return path


def checkpoint_weights(
    checkpoint: Path, hf_config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of a checkpoint, in the order of the family's table, rounded to `dtype` if given.

    Raises UsageError before the first tensor if the checkpoint is not of this model.
    """
    shape = shape_of(hf_config)
    sharded = checkpoint / SHARDED if (checkpoint / SHARDED).is_dir() else checkpoint
    _check_content(checkpoint, shape)
    reader = TorchDistReader(sharded)
    return _read(reader, _plan(reader, hf_config, shape), shape, dtype)


def _check_content(checkpoint: Path, shape: ModelShape) -> None:
    if not (checkpoint / MANIFEST).is_file():
        return
    try:
        content = read_manifest(checkpoint).content
    except DamagedCheckpointError as error:
        raise RunError(f"checkpoint {checkpoint} is damaged: {error}; take another step") from error
    differing = [f"{name} is {content[name]} there, {value} in config.json"
                 for name, value in asdict(shape).items() if content.get(name, value) != value]  # fmt: skip
    if differing:
        raise UsageError(f"checkpoint {checkpoint} is of another model: {', '.join(differing)}; "
                         "name the model folder that the run started from by --model DIR")  # fmt: skip


def _plan(reader: TorchDistReader, hf_config: Mapping[str, Any], shape: ModelShape) -> list[_Item]:
    items = []
    for template, layer in family_of(hf_config).templates(shape):
        shapes = hf_shapes(template, hf_config)
        key = _stored_key(reader, template, shapes, shape)
        experts = range(shape.num_experts) if template.is_expert else (None,)
        items += [
            _Item(template.at(layer, expert), key, stored_index(template, layer, expert), shapes) for expert in experts
        ]
    return items


def _stored_key(reader: TorchDistReader, template: Rule, shapes: list[Shape], shape: ModelShape) -> str:
    """The parameter's key; UsageError if there is none or the tensor has other sizes than config.json asks for."""
    candidates = stored_keys(template)
    key = next((key for key in candidates if key in reader), None)
    if key is None:
        raise UsageError(f"{reader.folder}: holds no {candidates[0]}, which config.json asks for; check --model")
    counts, found = stored_counts(template, shape.num_layers, shape.num_experts), reader.shape(key)
    rows = sum(size[0] for size in shapes)
    # The vocabulary was padded so that the tensor-parallel size divided it.
    has_rows = len(found) > len(counts) and (
        found[len(counts)] >= rows if template.is_vocab else found[len(counts)] == rows
    )
    if found[: len(counts)] != counts or not has_rows or found[len(counts) + 1 :] != shapes[0][1:]:
        raise UsageError(f"{reader.folder}: {key} has shape {list(found)}, config.json asks for "
                         f"{[*counts, rows, *shapes[0][1:]]}; check --model")  # fmt: skip
    return key


def _read(
    reader: TorchDistReader, items: list[_Item], shape: ModelShape, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for item in items:
        fused = reader.read(item.key, item.at)
        pieces = item.rule.fusion.unfuse(fused[: shape.vocab_size] if item.rule.is_vocab else fused, shape)
        for name, piece, expected in zip(item.rule.hf, pieces, item.shapes, strict=True):
            if tuple(piece.shape) != expected:
                raise RunError(f"{name} came out with shape {list(piece.shape)} instead of {list(expected)}: "
                               "the family's table is wrong")  # fmt: skip
            yield name, piece if dtype is None else piece.to(dtype)
            del piece
        del fused, pieces
