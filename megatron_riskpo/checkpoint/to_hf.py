"""The Hugging Face tensors of a Megatron checkpoint: of which of its rows each is made.

One process, no process groups, no model: the files say under which layout they were written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_riskpo.checkpoint.manifest import SHARDED
from megatron_riskpo.checkpoint.rows import Rows, check_reordered, runs_of
from megatron_riskpo.checkpoint.source import check_content
from megatron_riskpo.checkpoint.torch_dist import TorchDistReader
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.checkpoint.weight_map.base import ModelShape, Rule
from megatron_riskpo.checkpoint.weight_map.shapes import Shape, hf_shapes
from megatron_riskpo.checkpoint.weight_map.stored import stored_counts, stored_index, stored_keys
from megatron_riskpo.errors import RunError, UsageError


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model."""

    rule: Rule
    key: str
    at: tuple[int, ...]
    shapes: list[Shape]
    """Of its Hugging Face tensors."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return sum(map(prod, self.shapes)) * self.dtype.itemsize


class MegatronWeights:
    """What a checkpoint holds of a model. Raises UsageError if it is not of this model."""

    def __init__(self, checkpoint: Path, hf_config: Mapping[str, Any]) -> None:
        check_content(checkpoint, hf_config)
        sharded = checkpoint / SHARDED
        self._reader = TorchDistReader(sharded if sharded.is_dir() else checkpoint)
        self._shape = shape_of(hf_config)
        self.parameters = _parameters(self._reader, hf_config, self._shape)
        """In the order of the family's table."""

    @property
    def dtypes(self) -> list[torch.dtype]:
        return sorted({parameter.dtype for parameter in self.parameters}, key=str)

    def tensors(self, parameter: Parameter) -> Iterator[Rows]:
        """Its Hugging Face tensors. Raises RunError for a damaged file."""
        fused = self._reader.stored(parameter.key, parameter.at)
        # Without the padding of the vocabulary.
        numbers = torch.arange(sum(shape[0] for shape in parameter.shapes))
        pieces = parameter.rule.fusion.unfuse(numbers, self._shape)
        check_reordered(numbers, torch.cat(pieces), parameter.key)
        for name, piece, shape in zip(parameter.rule.hf, pieces, parameter.shapes, strict=True):
            rows = Rows(name, runs_of(piece, [fused]))
            if rows.shape != shape:
                raise RunError(f"{name} came out with shape {list(rows.shape)} instead of {list(shape)}: "
                               "the family's table is wrong")  # fmt: skip
            yield rows

    def tensor(self, parameter: Parameter, index: int) -> Rows:
        """One of them."""
        return list(self.tensors(parameter))[index]


def _parameters(reader: TorchDistReader, hf_config: Mapping[str, Any], shape: ModelShape) -> list[Parameter]:
    found = []
    for template, layer in family_of(hf_config).templates(shape):
        shapes = hf_shapes(template, hf_config)
        key = _stored_key(reader, template, shapes, shape)
        for expert in range(shape.num_experts) if template.is_expert else (None,):
            at = stored_index(template, layer, expert)
            found.append(Parameter(template.at(layer, expert), key, at, shapes, reader.dtype(key)))
    return found


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
