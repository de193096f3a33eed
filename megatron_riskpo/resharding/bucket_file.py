"""A bucket of weights as a file that two processes of one machine map into memory: no copy over a socket.

The file holds the tensors' bytes, each at a multiple of 64. What they are travels beside it, as a JSON-able record with
the file's checksum.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.resharding.buckets import NamedTensor

# Tensors may be viewed in any dtype, and copied by vector instructions.
_ALIGNMENT = 64


Bucket = Sequence[NamedTensor]


class CorruptBucketError(ValueError):
    """The bytes that arrived are not those that were sent."""


def write_bucket(path: Path, bucket: Bucket) -> dict[str, Any]:
    """Write the tensors (any device) to a new file; the record that `read_bucket` takes."""
    entries, size = [], 0
    for name, tensor in bucket:
        entries.append({"name": name, "dtype": _dtype_name(tensor), "shape": list(tensor.shape), "offset": size})
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    # Reserved, not only sized: a full memory file system must be an error here and not a SIGBUS at the copy.
    with path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    whole = _map(path, size)
    for (_, tensor), entry in zip(bucket, entries, strict=True):
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        whole[entry["offset"] : entry["offset"] + flat.numel()].copy_(flat)
    return {"file": str(path), "size": size, "checksum": _checksum(whole), "tensors": entries}


def read_bucket(record: dict[str, Any]) -> list[NamedTensor]:
    """The tensors of a record, views of the file, which may be deleted then. Raises CorruptBucketError where the file
    is not the one that was written, OSError where there is none."""
    path, size = Path(record["file"]), record["size"]
    found = path.stat().st_size
    if found < size:
        raise CorruptBucketError(f"bucket {path} has {found} bytes, {size} were sent")
    whole = _map(path, size)
    checksum = _checksum(whole)
    if checksum != record["checksum"]:
        first = record["tensors"][0]["name"] if record["tensors"] else "nothing"
        raise CorruptBucketError(
            f"bucket {path} ({len(record['tensors'])} tensors from {first!r}) has checksum {checksum:08x}, "
            f"{record['checksum']:08x} was sent"
        )
    return [(entry["name"], _tensor(whole, entry)) for entry in record["tensors"]]


def _map(path: Path, size: int) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _checksum(whole: Tensor) -> int:
    return zlib.crc32(memoryview(whole.numpy()))


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensor(whole: Tensor, entry: dict[str, Any]) -> Tensor:
    dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return whole[entry["offset"] : entry["offset"] + num_bytes].view(dtype).view(shape)
