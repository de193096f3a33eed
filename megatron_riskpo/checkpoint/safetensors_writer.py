"""Writes safetensors files under Hugging Face's names as the tensors come: memory holds one tensor at a time, or none.

A safetensors file begins with a table of its tensors, which is not known before the last one has come. So room is
left for it: the format lets the table end in spaces.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.checkpoint.manifest import sync_to_disk

MAX_SHARD_BYTES = 5 * 10**9
"""Of tensors in a file; one larger tensor makes a larger file."""
HEADER_BYTES = 2**17
"""For the length of the table, 8 bytes, and the table; a full table begins the next file as a full file does."""
INDEX = "model.safetensors.index.json"

DTYPE_OF_CODE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""The format's names of dtypes, and torch's."""
_CODES = {getattr(torch, name): code for code, name in DTYPE_OF_CODE.items()}


@dataclass
class Shard:
    """A file of tensors, before it has its name."""

    path: Path
    num_bytes: int = 0
    """Of its tensors."""
    table: dict[str, dict[str, Any]] = field(default_factory=dict)
    table_bytes: int = 0


class ShardWriter:
    """Tensors into files of bounded size, one of several writers' in a folder; raises OSError."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self.shards: list[Shard] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        path, offset = self.reserve(name, tensor.dtype, tuple(tensor.shape))
        with path.open("rb+", buffering=0) as file:
            file.seek(offset)
            content = memoryview(_bytes_of(tensor))
            while content:
                content = content[file.write(content) :]

    def reserve(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Path, int]:
        """Room for one tensor: the file and the offset where its bytes go."""
        num_bytes = prod(shape) * dtype.itemsize
        entry = {"dtype": _CODES[dtype], "shape": list(shape)}
        # 64: the offsets and the punctuation around the entry.
        entry_bytes = len(json.dumps({name: entry}).encode()) + 64
        shard = self.shards[-1] if self.shards else self._begin()
        is_full = shard.num_bytes + num_bytes > MAX_SHARD_BYTES or shard.table_bytes + entry_bytes > HEADER_BYTES - 256
        if shard.table and is_full:
            shard = self._begin()
        start = shard.num_bytes
        shard.table[name] = {**entry, "data_offsets": [start, start + num_bytes]}
        shard.table_bytes += entry_bytes
        shard.num_bytes += num_bytes
        return shard.path, HEADER_BYTES + start

    def finish(self) -> list[Shard]:
        """Write the tables, and all to the disk; the files still have to get their names."""
        for shard in self.shards:
            table = json.dumps({"__metadata__": {"format": "pt"}, **shard.table}, separators=(",", ":")).encode()
            size = HEADER_BYTES - 8
            with shard.path.open("rb+") as file:
                file.write(size.to_bytes(8, "little") + table.ljust(size))
            sync_to_disk(shard.path)
        return self.shards

    def _begin(self) -> Shard:
        shard = Shard(self.folder / f"rank-{self.rank}-shard-{len(self.shards)}.safetensors")
        shard.path.touch()
        self.shards.append(shard)
        return shard


def name_shards(shards: Sequence[Shard]) -> None:
    """Give all writers' files Hugging Face's names, in this order, and write the index when there are several."""
    count, weight_map, folder = len(shards), {}, shards[0].path.parent
    for i, shard in enumerate(shards):
        file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        shard.path.rename(folder / file)
        weight_map.update(dict.fromkeys(shard.table, file))
    if count > 1:
        index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _bytes_of(tensor: Tensor) -> Any:
    """The tensor's memory, in order, without a copy where it lies in the CPU's memory in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
