"""Hugging Face model folders: slices of the weights, and a whole folder written tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_riskpo.checkpoint.manifest import partial_of, sync_folder, sync_to_disk
from megatron_riskpo.checkpoint.rows import Block, StoredTensor
from megatron_riskpo.checkpoint.safetensors_writer import DTYPE_OF_CODE, INDEX, ShardWriter, name_shards
from megatron_riskpo.checkpoint.weight_map.base import pad_vocab
from megatron_riskpo.errors import UsageError


class HfReader:
    """Slices of a folder's safetensors, without reading whole files. Raises UsageError: no file, or a damaged one."""

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        files = sorted(self.model_dir.glob("*.safetensors"))
        if not files:
            raise UsageError(f"no *.safetensors in {self.model_dir}; save the model with safetensors")
        self.files_of: dict[str, list[str]] = {}
        """The files in which a tensor is; more than one is a mistake of the writer."""
        self._handle_of = {}
        self._tables: dict[str, tuple[int, dict[str, Any]]] = {}
        for file in files:
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
                self.files_of.setdefault(name, []).append(file.name)
                self._handle_of[name] = handle

    @property
    def names(self) -> set[str]:
        """All tensor names in the folder."""
        return set(self._handle_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._slice(name).get_shape())

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor's bytes are."""
        shape, file = self.shape(name), self.files_of[name][-1]
        dtype = getattr(torch, self.dtype(name), None)
        if dtype is None:
            raise UsageError(f"{self.model_dir}: {name} is {self.dtype(name)}; save the model in bfloat16 or float32")
        if file not in self._tables:
            self._tables[file] = _read_table(self.model_dir / file)
        start, table = self._tables[file]
        place = start + table[name]["data_offsets"][0]
        num_rows = shape[0] if shape else 1
        whole = Block(self.model_dir / file, place, 0, num_rows, 0, prod(shape[1:]) * dtype.itemsize)
        return StoredTensor(name, dtype, shape, (whole,))

    def dtype(self, name: str) -> str:
        """As config.json calls it."""
        code = str(self._slice(name).get_dtype())
        return DTYPE_OF_CODE.get(code, code)

    def _slice(self, name: str) -> Any:
        if name not in self._handle_of:
            raise UsageError(f"{self.model_dir}: the safetensors hold no {name}; the folder and config.json disagree")
        return self._handle_of[name].get_slice(name)

    def read(self, name: str, shard_dim: int | None, rank: int, num_ranks: int, num_rows: int | None) -> Tensor:
        """The rank's piece of a tensor cut evenly along shard_dim; num_rows pads dimension 0 first (vocabulary)."""
        view = self._slice(name)
        if shard_dim is None:
            return view[:]
        size = view.get_shape()[shard_dim]
        piece = (num_rows or size) // num_ranks
        start = rank * piece
        rows = slice(min(start, size), min(start + piece, size))
        if shard_dim == 0:
            return pad_vocab(view[rows], piece)
        return view[:, rows]


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise UsageError(f"{file} is damaged, or no safetensors file ({error}); copy or download it again") from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error}); copy or download it again") from error


def _read_table(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and what it says of each; the file has been opened without
    complaint."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return 8 + size, json.loads(stream.read(size))


def side_files(folder: Path) -> list[Path]:
    """What a model folder holds beside the weights: config.json, tokenizer, generation_config.json and the like."""
    suffixes = (".json", ".model", ".txt", ".jinja")
    return [file for file in sorted(folder.iterdir())
            if file.is_file() and file.suffix in suffixes and file.name != INDEX]  # fmt: skip


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
    building = partial_of(target)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        _write(building, weights, hf_config)
        add_files(building)
    except BaseException:
        # Half a model may be what fills the disk.
        shutil.rmtree(building, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(target)
    sync_folder(building)
    building.rename(target)
    sync_to_disk(target.absolute().parent)


def _write(folder: Path, weights: Iterable[tuple[str, Tensor]], hf_config: dict[str, Any]) -> None:
    writer = ShardWriter(folder)
    dtypes = set()
    for name, tensor in weights:
        dtypes.add(tensor.dtype)
        writer.add(name, tensor)
    name_shards(writer.finish())
    # One dtype throughout in what the actor trains.
    (dtype,) = dtypes
    write_config(folder, hf_config, dtype)


def write_config(folder: Path, hf_config: dict[str, Any], dtype: torch.dtype) -> None:
    """config.json, with the weights' dtype."""
    name = str(dtype).removeprefix("torch.")
    # transformers and vLLM read it from here, older ones as torch_dtype.
    config = {**hf_config, "dtype": name} | ({"torch_dtype": name} if "torch_dtype" in hf_config else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
