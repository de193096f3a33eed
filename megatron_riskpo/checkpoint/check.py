"""Whether a Hugging Face folder holds what its config.json asks for, and the same as another folder or a checkpoint."""

import contextlib
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_riskpo.checkpoint.hf_folder import HfReader
from megatron_riskpo.checkpoint.rows import RowReader, Rows
from megatron_riskpo.checkpoint.safetensors_writer import INDEX
from megatron_riskpo.checkpoint.source import find_checkpoint
from megatron_riskpo.checkpoint.team import Team
from megatron_riskpo.checkpoint.to_hf import MegatronWeights
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.checkpoint.weight_map.shapes import Shape, hf_shapes
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.errors import UsageError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_ROWS = 50


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    tensor: str
    what: str


def check_folder(folder: Path) -> list[Finding]:
    """Names, shapes and dtypes against config.json, files against the index.

    Raises UsageError: no model folder, a family that is not known, a damaged file.
    """
    hf_config = load_model_config(folder, "HF_DIR")
    expected = expected_shapes(hf_config)
    reader = HfReader(folder)
    tied = shape_of(hf_config).tied_embeddings
    # Some writers store the tied head again.
    known = expected.keys() | ({HEAD} if tied else set())
    return [
        *_missing_files(folder),
        *_missing(expected, reader.names, known),
        *_unknown(expected, reader.names, known),
        *(Finding(name, f"is in {' and '.join(files)}") for name, files in reader.files_of.items() if len(files) > 1),
        *_against_index(folder, reader),
        *_shapes_and_dtypes(expected, reader, hf_config),
        *(_tied_head(reader) if tied else ()),
    ]


def compare(team: Team, folder: Path, other: Path) -> list[Finding]:
    """Every tensor of two model folders, or of a model folder and a checkpoint of the same model, bit for bit: the
    findings of all processes, each of which reads a share.

    Raises UsageError if `other` is neither.
    """
    reader, weights = team.each(lambda: HfReader(folder)), _weights(team, other, folder)

    def own() -> list[Finding]:
        shared = sorted(reader.names & weights.keys())[team.rank :: team.size]
        found = ((name, _difference(_rows(reader, name), weights[name]())) for name in shared)
        return [Finding(name, what) for name, what in found if what]

    lonely = [
        *(Finding(name, f"is in {other} only") for name in weights if name not in reader.names),
        *(Finding(name, f"is in {folder} only") for name in sorted(reader.names - weights.keys())),
    ]
    return sorted((finding for part in team.gather(own) for finding in part), key=lambda one: one.tensor) + lonely


def report(findings: list[Finding]) -> str:
    """A table; a long one is cut, its last line has the number."""
    shown = findings[:MAX_ROWS]
    width = max(len(finding.tensor) for finding in shown)
    lines = [f"{'tensor':<{width}}  what differs", *(f"{finding.tensor:<{width}}  {finding.what}" for finding in shown)]
    if len(findings) > len(shown):
        lines.append(f"... and {len(findings) - len(shown)} more")
    num_tensors = len({finding.tensor for finding in findings})
    return "\n".join([*lines, f"{len(findings)} differences in {num_tensors} tensors"])


def _weights(team: Team, source: Path, folder: Path) -> Mapping[str, Callable[[], Rows]]:
    """By Hugging Face name, what finds the tensor in its files."""
    if team.first(lambda: _has_safetensors(source)):
        reader = team.each(lambda: HfReader(source))
        return {name: partial(_rows, reader, name) for name in sorted(reader.names)}
    checkpoint = find_checkpoint(source, None, team)
    weights = team.each(lambda: MegatronWeights(checkpoint, load_model_config(folder, "HF_DIR")))
    return {
        name: partial(weights.tensor, parameter, index)
        for parameter in weights.parameters
        for index, name in enumerate(parameter.rule.hf)
    }


def _has_safetensors(source: Path) -> bool:
    if not source.is_dir():
        raise UsageError(f"OTHER = {source}: no such folder; give a Hugging Face folder, a run's, or one "
                         "checkpoints/step_N of it")  # fmt: skip
    return any(source.glob("*.safetensors"))


def _rows(reader: HfReader, name: str) -> Rows:
    return Rows(name, reader.stored(name).runs())


def expected_shapes(hf_config: dict[str, Any]) -> dict[str, Shape]:
    """Of every Hugging Face tensor, by name. Raises UsageError for an unknown family, and for sizes that are missing or
    no numbers."""
    try:
        rules = family_of(hf_config).rules(shape_of(hf_config))
        return {name: shape for rule in rules for name, shape in zip(rule.hf, hf_shapes(rule, hf_config), strict=True)}
    except KeyError as error:
        raise UsageError(f"config.json has no {error}, which the sizes follow from; restore the file") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"config.json has a size that is no number above 0 ({error}); restore the file") from error


def _missing(expected: Iterable[str], names: set[str], known: set[str]) -> Iterator[Finding]:
    for count, name in enumerate(name for name in expected if name not in names):
        near = _nearest(name, names - known) if count < MAX_ROWS else None
        yield Finding(name, "is missing" + (f"; there is an unknown {near}" if near else ""))


def _unknown(expected: Iterable[str], names: set[str], known: set[str]) -> Iterator[Finding]:
    free = set(expected) - names
    for count, name in enumerate(sorted(names - known)):
        near = (_nearest(name, free) or _nearest(name, known)) if count < MAX_ROWS else None
        yield Finding(name, "is unknown" + (f"; the nearest known name is {near}" if near else ""))


def _nearest(name: str, candidates: set[str]) -> str | None:
    """Among names with the same numbers if there are any: of 20,000 experts' names few are worth a comparison."""
    numbers = re.findall(r"\d+", name)
    alike = [candidate for candidate in candidates if re.findall(r"\d+", candidate) == numbers]
    return next(iter(difflib.get_close_matches(name, sorted(alike or candidates), n=1, cutoff=0.5)), None)


def _missing_files(folder: Path) -> Iterator[Finding]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        for file, count in sorted(Counter(_listed(folder).values()).items()):
            if not (folder / file).is_file():
                yield Finding(file, f"is missing; {INDEX} puts {count} tensors there")


def _against_index(folder: Path, reader: HfReader) -> Iterator[Finding]:
    try:
        listed = _listed(folder)
        for name in sorted(listed.keys() | reader.names):
            files = reader.files_of.get(name, [])
            if name not in listed:
                yield Finding(name, f"is not in {INDEX}")
            elif listed[name] not in files and (folder / listed[name]).is_file():
                yield Finding(name, f"is in {' and '.join(files) or 'no file'}, {INDEX} says {listed[name]}")
    except FileNotFoundError:
        if len(list(folder.glob("*.safetensors"))) > 1:
            yield Finding(INDEX, "is missing, with several files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding(INDEX, f"is not readable ({type(error).__name__}: {error})")


def _listed(folder: Path) -> dict[str, str]:
    """The index's file of each tensor."""
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]


def _shapes_and_dtypes(expected: dict[str, Shape], reader: HfReader, hf_config: dict[str, Any]) -> Iterator[Finding]:
    dtype = hf_config.get("dtype") or hf_config.get("torch_dtype")
    for name, shape in expected.items():
        if name not in reader.names:
            continue
        found = reader.shape(name)
        if found != shape:
            yield Finding(name, f"has shape {list(found)}, config.json asks for {list(shape)}")
        # Without one in config.json the first tensor's counts: a model has one dtype throughout.
        dtype = dtype or reader.dtype(name)
        if reader.dtype(name) != dtype:
            yield Finding(name, f"is {reader.dtype(name)}, the model {dtype}")


def _tied_head(reader: HfReader) -> Iterator[Finding]:
    if {EMBEDDING, HEAD} <= reader.names:
        difference = _difference(_rows(reader, HEAD), _rows(reader, EMBEDDING))
        if difference:
            yield Finding(HEAD, f"is not {EMBEDDING}, with tied embeddings: {difference}")


def _difference(a: Rows, b: Rows) -> str | None:
    """What two tensors differ in; None: not a bit."""
    if a.shape != b.shape:
        return f"has shape {list(a.shape)} there, {list(b.shape)} in the other"
    if a.dtype != b.dtype:
        return f"is {_name(a.dtype)} there, {_name(b.dtype)} in the other"
    num_differing, largest = 0, 0.0
    for of_a, of_b in zip(RowReader().blocks(a), RowReader().blocks(b), strict=True):
        # As bits: a NaN is unlike itself, and the two zeros are alike.
        if np.array_equal(of_a, of_b):
            continue
        differs = (of_a != of_b).reshape(-1, a.dtype.itemsize).any(1)
        x, y = (torch.from_numpy(block).view(a.dtype)[torch.from_numpy(differs)].double() for block in (of_a, of_b))
        gaps = (x - y).abs().nan_to_num(float("inf"))
        num_differing, largest = num_differing + len(gaps), max(largest, gaps.max().item())
    if not num_differing:
        return None
    checksums = f"checksums {_checksum(a)} and {_checksum(b)}"
    return f"{num_differing} of {prod(a.shape)} values, by up to {largest:.3g} ({checksums})"


def _checksum(rows: Rows) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for block in RowReader().blocks(rows):
        digest.update(memoryview(block))
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
