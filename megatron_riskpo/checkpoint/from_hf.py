"""The Megatron parameters of a Hugging Face folder: of which of its rows each is made."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_riskpo.checkpoint.hf_folder import HfReader
from megatron_riskpo.checkpoint.rows import Rows, check_reordered, first_numbers, runs_of
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.checkpoint.weight_map.stored import stored_counts, stored_index, stored_keys


@dataclass(frozen=True)
class Slice:
    """One parameter, which is a slice of what Megatron stores under `key`."""

    key: str
    at: tuple[int, ...]
    counts: tuple[int, ...]
    rows: Rows

    @property
    def has_empty_object(self) -> bool:
        """Whether the module has an object without content beside it."""
        return re.search(r"\.linear_\w+\.weight$", self.key) is not None


def megatron_slices(reader: HfReader, hf_config: Mapping[str, Any]) -> Iterator[Slice]:
    """Every parameter, in the order of the family's table; the folder has been checked.

    The vocabulary is not padded: Megatron pads it when it loads, for its own tensor-parallel size.
    """
    shape = shape_of(hf_config)
    for template, layer in family_of(hf_config).templates(shape):
        counts, key = stored_counts(template, shape.num_layers, shape.num_experts), stored_keys(template)[0]
        for expert in range(shape.num_experts) if template.is_expert else (None,):
            tensors = [reader.stored(name) for name in template.at(layer, expert).hf]
            numbers = [
                torch.arange(first, first + tensor.num_rows)
                for first, tensor in zip(first_numbers(tensors), tensors, strict=True)
            ]
            order = template.fusion.fuse(numbers, shape)
            check_reordered(torch.cat(numbers), order, key)
            yield Slice(key, stored_index(template, layer, expert), counts, Rows(key, runs_of(order, tensors)))
