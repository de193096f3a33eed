"""Whether a Hugging Face folder holds what its config.json asks for, and the same as another folder or a checkpoint."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.checkpoint.convert import checkpoint_weights, find_checkpoint
from megatron_riskpo.checkpoint.hf_folder import HfReader
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.checkpoint.weight_map.shapes import Shape, hf_shapes
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.errors import UsageError

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_ROWS = 50
_BLOCK = 2**22
"""Values whose difference is in memory at a time."""


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
    expected = _expected_shapes(hf_config)
    reader = HfReader(folder)
    tied = shape_of(hf_config).tied_embeddings
    # Some writers store the tied head again.
    known = expected.keys() | ({HEAD} if tied else set())
    return [
        *_missing(expected, reader.names, known),
        *_unknown(expected, reader.names, known),
        *(Finding(name, f"is in {' and '.join(files)}") for name, files in reader.files_of.items() if len(files) > 1),
        *_against_index(folder, reader),
        *_shapes_and_dtypes(expected, reader, hf_config),
        *(_tied_head(reader) if tied else ()),
    ]


def compare(folder: Path, other: Path) -> list[Finding]:
    """Every tensor of two model folders, or of a model folder and a checkpoint of the same model, bit for bit.

    Raises UsageError if `other` is neither.
    """
    reader = HfReader(folder)
    findings, seen = [], set()
    for name, tensor in _weights(other, folder):
        seen.add(name)
        if name not in reader.names:
            findings.append(Finding(name, f"is in {other} only"))
        elif difference := _difference(reader.whole(name), tensor):
            findings.append(Finding(name, difference))
    return findings + [Finding(name, f"is in {folder} only") for name in sorted(reader.names - seen)]


def report(findings: list[Finding]) -> str:
    """A table; a long one is cut, its last line has the number."""
    shown = findings[:MAX_ROWS]
    width = max(len(finding.tensor) for finding in shown)
    lines = [f"{'tensor':<{width}}  what differs", *(f"{finding.tensor:<{width}}  {finding.what}" for finding in shown)]
    if len(findings) > len(shown):
        lines.append(f"... and {len(findings) - len(shown)} more")
    num_tensors = len({finding.tensor for finding in findings})
    return "\n".join([*lines, f"{len(findings)} differences in {num_tensors} tensors"])


def _weights(source: Path, folder: Path) -> Iterator[tuple[str, Tensor]]:
    if any(source.glob("*.safetensors")):
        reader = HfReader(source)
        return ((name, reader.whole(name)) for name in sorted(reader.names))
    return checkpoint_weights(find_checkpoint(source, None), load_model_config(folder, "HF_DIR"))


def _expected_shapes(hf_config: dict[str, Any]) -> dict[str, Shape]:
    try:
        rules = family_of(hf_config).rules(shape_of(hf_config))
        return {name: shape for rule in rules for name, shape in zip(rule.hf, hf_shapes(rule, hf_config), strict=True)}
    except KeyError as error:
        raise UsageError(f"config.json has no {error}, which the sizes follow from; restore the file") from error


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


def _against_index(folder: Path, reader: HfReader) -> Iterator[Finding]:
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        if len(list(folder.glob("*.safetensors"))) > 1:
            yield Finding(INDEX, "is missing, with several files")
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Finding(INDEX, f"is not readable ({type(error).__name__}: {error})")
        return
    for name in sorted(listed.keys() | reader.names):
        files = reader.files_of.get(name, [])
        if name not in listed:
            yield Finding(name, f"is not in {INDEX}")
        elif listed[name] not in files:
            yield Finding(name, f"is in {' and '.join(files) or 'no file'}, {INDEX} says {listed[name]}")


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
        difference = _difference(reader.whole(HEAD), reader.whole(EMBEDDING))
        if difference:
            yield Finding(HEAD, f"is not {EMBEDDING}, with tied embeddings: {difference}")


def _difference(a: Tensor, b: Tensor) -> str | None:
    """What two tensors differ in; None: not a bit."""
    if a.shape != b.shape:
        return f"has shape {list(a.shape)} there, {list(b.shape)} in the other"
    if a.dtype != b.dtype:
        return f"is {_name(a)} there, {_name(b)} in the other"
    x, y = _bits(a), _bits(b)
    # As bits: a NaN is unlike itself, and the two zeros are alike.
    if torch.equal(x, y):
        return None
    num_differing, largest = 0, 0.0
    for of_a, of_b in zip(a.reshape(-1).split(_BLOCK), b.reshape(-1).split(_BLOCK), strict=True):
        differs = (_bits(of_a) != _bits(of_b)).view(len(of_a), -1).any(1)
        if differs.any():
            gaps = (of_a[differs].double() - of_b[differs].double()).abs().nan_to_num(float("inf"))
            num_differing, largest = num_differing + len(gaps), max(largest, gaps.max().item())
    return (
        f"{num_differing} of {a.numel()} values, by up to {largest:.3g} (checksums {_checksum(x)} and {_checksum(y)})"
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _checksum(bits: Tensor) -> str:
    return hashlib.blake2b(memoryview(bits.numpy()), digest_size=8).hexdigest()


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
