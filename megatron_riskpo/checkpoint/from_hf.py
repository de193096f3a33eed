"""From a Hugging Face folder to a torch_dist checkpoint of the weights, one Megatron parameter in memory at a time."""

import re
import shutil
from pathlib import Path

import torch

from megatron_riskpo.checkpoint.hf_folder import HfReader
from megatron_riskpo.checkpoint.torch_dist_writer import TorchDistWriter
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.checkpoint.weight_map.base import ModelShape, Rule
from megatron_riskpo.checkpoint.weight_map.stored import stored_counts, stored_index, stored_keys
from megatron_riskpo.config_io import load_model_config


def write_megatron(folder: Path, target: Path, dtype: torch.dtype | None = None) -> int:
    """Write `target`, which appears whole; returns the number of Hugging Face tensors. `folder` has been checked.

    The vocabulary is not padded: Megatron pads it when it loads, for its own tensor-parallel size.
    """
    hf_config = load_model_config(folder, "HF_DIR")
    shape, reader = shape_of(hf_config), HfReader(folder)
    building = target.with_name(target.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    num_tensors = 0
    try:
        writer = TorchDistWriter(building)
        for template, layer in family_of(hf_config).templates(shape):
            experts = range(shape.num_experts) if template.is_expert else (None,)
            for expert in experts:
                num_tensors += _write(writer, reader, template, layer, expert, shape, dtype)
        writer.finish()
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    building.rename(target)
    return num_tensors


def _write(
    writer: TorchDistWriter, reader: HfReader, template: Rule, layer: int, expert: int | None, shape: ModelShape,
    dtype: torch.dtype | None,
) -> int:  # fmt: skip
    names = template.at(layer, expert).hf
    fused = template.fusion.fuse([reader.whole(name) for name in names], shape)
    counts = stored_counts(template, shape.num_layers, shape.num_experts)
    piece = fused if dtype is None else fused.to(dtype)
    key, at = stored_keys(template)[0], stored_index(template, layer, expert)
    writer.add(key, at, counts, piece)
    if re.search(r"\.linear_\w+\.weight$", key):
        writer.add_empty_object(key.removesuffix("weight") + "_extra_state", at, counts)
    return len(names)
