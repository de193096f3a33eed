"""Writes safetensors files under Hugging Face's names as the tensors come: memory holds one tensor at a time.

A safetensors file begins with a table of its tensors, which is not known before the last one has come. So room is
left for it: the format lets the table end in spaces.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9
"""Of tensors in a file; one larger tensor makes a larger file."""
HEADER_BYTES = 2**17
"""For the length of the table, 8 bytes, and the table; a full table begins the next file as a full file does."""

DTYPE_OF_CODE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""The format's names of dtypes, and torch's."""
_CODES = {getattr(torch, name): code for code, name in DTYPE_OF_CODE.items()}


class ShardWriter:
    """Tensors into files of bounded size; raises OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None
        self._table: dict[str, dict[str, Any]] = {}
        self._table_bytes = 0
        self._shard_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        num_bytes = tensor.numel() * tensor.element_size()
        start = self._shard_bytes
        entry = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape)}
        # 64: the offsets and the punctuation around the entry.
        entry_bytes = len(json.dumps({name: entry}).encode()) + 64
        is_full = start + num_bytes > MAX_SHARD_BYTES or self._table_bytes + entry_bytes > HEADER_BYTES - 256
        if self._table and is_full:
            self._close_shard()
            start = 0
        if self._file is None:
            self._file = self._path(len(self._shards)).open("wb")
            self._file.write(b" " * HEADER_BYTES)
        self._file.write(memoryview(_bytes_of(tensor)))
        self._table[name] = {**entry, "data_offsets": [start, start + num_bytes]}
        self._table_bytes += entry_bytes
        self._shard_bytes = start + num_bytes
        self._total_bytes += num_bytes

    def finish(self) -> None:
        """Give the files Hugging Face's names, and write the index when there are several."""
        self._close_shard()
        count = len(self._shards)
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._path(i).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.safetensors"

    def _close_shard(self) -> None:
        if self._file is None:
            return
        table = json.dumps({"__metadata__": {"format": "pt"}, **self._table}, separators=(",", ":")).encode()
        size = HEADER_BYTES - 8
        with self._file as file:
            file.seek(0)
            file.write(size.to_bytes(8, "little") + table.ljust(size))
        self._shards.append(list(self._table))
        self._file, self._table, self._table_bytes, self._shard_bytes = None, {}, 0, 0


def _bytes_of(tensor: Tensor) -> Any:
    """The tensor's memory, in order, without a copy where it lies in the CPU's memory in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
