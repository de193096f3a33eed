"""Hugging Face model folders: slices of the weights, and a whole folder written tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megatron_riskpo.checkpoint.safetensors_writer import ShardWriter
from megatron_riskpo.checkpoint.weight_map.base import pad_vocab
from megatron_riskpo.errors import UsageError


class HfReader:
    """Slices of a folder's safetensors, without reading whole files."""

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        files = sorted(self.model_dir.glob("*.safetensors"))
        if not files:
            raise UsageError(f"model.path: no *.safetensors in {self.model_dir}; save the model with safetensors")
        self._handles = [safe_open(str(file), framework="pt") for file in files]
        self._handle_of = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118 (a handle is no dict)

    @property
    def names(self) -> set[str]:
        """All tensor names in the folder."""
        return set(self._handle_of)

    def read(self, name: str, shard_dim: int | None, rank: int, num_ranks: int, num_rows: int | None) -> Tensor:
        """The rank's piece of a tensor cut evenly along shard_dim; num_rows pads dimension 0 first (vocabulary)."""
        if name not in self._handle_of:
            raise UsageError(f"{self.model_dir}: the safetensors hold no {name}; the folder and config.json disagree")
        view = self._handle_of[name].get_slice(name)
        if shard_dim is None:
            return view[:]
        size = view.get_shape()[shard_dim]
        piece = (num_rows or size) // num_ranks
        start = rank * piece
        rows = slice(min(start, size), min(start + piece, size))
        if shard_dim == 0:
            return pad_vocab(view[rows], piece)
        return view[:, rows]


def save_hf(
    target: str | Path, weights: Iterable[tuple[str, Tensor]], hf_config: dict[str, Any],
    add_files: Callable[[Path], None], is_writer: bool,
) -> None:  # fmt: skip
    """Write a Hugging Face folder: weights, config.json, and what `add_files(folder)` adds (tokenizer, ...).

    Every rank calls it (taking the weights is collective), the writer writes. The folder appears whole: it is
    built beside and renamed.
    """
    if not is_writer:
        for _ in weights:
            pass
        return
    target = Path(target)
    building = target.with_name(target.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    writer = ShardWriter(building)
    dtypes = set()
    for name, tensor in weights:
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        writer.add(name, tensor)
    writer.finish()
    # One dtype throughout in what the actor trains; transformers and vLLM read it from here.
    (dtype,) = dtypes
    config = {**hf_config, "dtype": dtype}
    (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    add_files(building)
    if target.exists():
        shutil.rmtree(target)
    building.rename(target)
