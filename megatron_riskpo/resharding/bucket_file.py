"""A bucket of weights as a file: two processes of one machine map it into memory, no copy over a socket; others read it
from a file system that they share.

The file holds the tensors' bytes, each at a multiple of 64. What they are travels beside it, as a JSON-able record with
the file's checksum.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_riskpo.resharding.buckets import NamedTensor

# Tensors may be viewed in any dtype, and copied by vector instructions.
_ALIGNMENT = 64
_MEMORY = Path("/dev/shm")


Bucket = Sequence[NamedTensor]


class CorruptBucketError(ValueError):
    """The bytes that arrived are not those that were sent."""


def write_bucket(path: Path, bucket: Bucket) -> dict[str, Any]:
    """Write the tensors (any device) to a new file, which other machines see, too, when this returns; the record that
    `read_bucket` takes. Raises OSError where the file system is full."""
    entries, size, checksum = [], 0, 0
    with path.open("xb") as file:
        for name, tensor in bucket:
            entries.append({"name": name, "dtype": _dtype_name(tensor), "shape": list(tensor.shape), "offset": size})
            content = _bytes(tensor)
            for part in (content, bytes(-len(content) % _ALIGNMENT)):
                file.write(part)
                checksum = zlib.crc32(part, checksum)
                size += len(part)
        # A network file system may keep them back until then, and hide that it is full.
        file.flush()
        os.fsync(file.fileno())
    return {
        "file": str(path), "size": size, "checksum": checksum, "tensors": entries, "in_memory": _is_in_memory(path),
    }  # fmt: skip


def read_bucket(record: dict[str, Any]) -> list[NamedTensor]:
    """The tensors of a record; the file may be deleted then. Raises CorruptBucketError where the file is not the one
    that was written, OSError where there is none."""
    path, size = Path(record["file"]), record["size"]
    with path.open("rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found < size:
            raise CorruptBucketError(f"bucket {path} has {found} bytes, {size} were sent")
        whole = _map(path, size) if record["in_memory"] else _read(file, size)
    checksum = zlib.crc32(memoryview(whole.numpy()))
    if checksum != record["checksum"]:
        first = record["tensors"][0]["name"] if record["tensors"] else "nothing"
        raise CorruptBucketError(
            f"bucket {path} ({len(record['tensors'])} tensors from {first!r}) has checksum {checksum:08x}, "
            f"{record['checksum']:08x} was sent"
        )
    return [(entry["name"], _tensor(whole, entry)) for entry in record["tensors"]]


def _is_in_memory(path: Path) -> bool:
    return _MEMORY.is_dir() and path.stat().st_dev == _MEMORY.stat().st_dev


def _map(path: Path, size: int) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _read(file: BinaryIO, size: int) -> Tensor:
    """Not mapped: what another machine has deleted would end the process (SIGBUS) once a page has to come again."""
    whole = torch.empty(size, dtype=torch.uint8)
    file.readinto(memoryview(whole.numpy()))  # type: ignore[attr-defined]
    return whole


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensor(whole: Tensor, entry: dict[str, Any]) -> Tensor:
    dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return whole[entry["offset"] : entry["offset"] + num_bytes].view(dtype).view(shape)
