"""Buckets of tensors between processes of one machine: a file in shared memory, named byte ranges, a checksum each.

The writer makes the file once, of the size of a bucket, and fills it again and again; who reads gets views into it, not
copies, valid until the next fill. When a bucket may be filled or read is agreed elsewhere (a request and its answer).
No pickle: the table of contents is JSON, so a reader runs nothing that a writer sends.

    magic 8 B | version int64 | bucket int64 | length of the table int64 | crc32 of the table int64 | table | payload
"""

import json
import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_riskpo.errors import RunError

NamedTensor = tuple[str, Tensor]
DIRECTORY = Path("/dev/shm")
"""Memory in the form of a file system, on every Linux."""

_MAGIC = b"RISKPOB1"
_HEADER = struct.Struct("<8s4q")
_ALIGNMENT = 64
_TABLE_BYTES_PER_TENSOR = 512


@dataclass(frozen=True)
class BucketContent:
    """What a bucket holds."""

    version: int
    """Of the weights."""
    bucket: int
    """Its number within the push."""
    tensors: list[NamedTensor]
    """Views into the shared memory."""


class SharedBucket:
    """The writer's side: a file of its own, removed by `close`."""

    def __init__(self, max_bytes: int, max_tensors: int = 4096, directory: Path = DIRECTORY) -> None:
        """Room for `max_bytes` of tensors. RunError where the shared memory has less."""
        self.max_bytes = max_bytes
        capacity = _HEADER.size + max_tensors * (_TABLE_BYTES_PER_TENSOR + _ALIGNMENT) + max_bytes
        file, name = tempfile.mkstemp(prefix="riskpo-bucket-", dir=directory)  # readable by this user only
        self.path = Path(name)
        try:
            # Blocks are taken now: a sparse file would end the writer with SIGBUS once the memory is full.
            os.posix_fallocate(file, 0, capacity)
            self._memory = mmap.mmap(file, capacity)
        except OSError as error:
            self.path.unlink()
            raise RunError(
                f"{directory} has no room for a bucket of {capacity / 2**20:.0f} MiB ({error.strerror}); lower "
                "bridge.bucket_mib, or give the container more shared memory (docker: --shm-size)"
            ) from error
        finally:
            os.close(file)

    def fill(self, tensors: Sequence[NamedTensor], version: int, bucket: int) -> None:
        """Put the tensors in, in place of what was there. RunError if they do not fit."""
        self._memory[: len(_MAGIC)] = bytes(len(_MAGIC))  # no bucket until it is whole
        blobs = [(name, tensor.detach().cpu().contiguous()) for name, tensor in tensors]
        table, offset = [], 0
        for name, blob in blobs:
            entry = {"name": name, "dtype": str(blob.dtype).removeprefix("torch."), "shape": list(blob.shape)}
            table.append(entry | {"offset": offset, "crc32": zlib.crc32(_bytes_of(blob))})
            offset += -(-blob.nbytes // _ALIGNMENT) * _ALIGNMENT
        encoded = json.dumps(table).encode()
        start = _payload_start(len(encoded))
        if start + offset > len(self._memory):
            raise RunError(
                f"bucket {bucket} of weight version {version}: {len(tensors)} tensors of {offset} bytes do not fit "
                f"into {len(self._memory)} bytes of shared memory"
            )
        for entry, (_, blob) in zip(table, blobs, strict=True):
            begin = start + entry["offset"]
            self._memory[begin : begin + blob.nbytes] = _bytes_of(blob)
        self._memory[_HEADER.size : _HEADER.size + len(encoded)] = encoded
        header = _HEADER.pack(_MAGIC, version, bucket, len(encoded), zlib.crc32(encoded))
        self._memory[: _HEADER.size] = header

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        self.path.unlink(missing_ok=True)


def read_bucket(path: str | Path) -> BucketContent:
    """The reader's side: every byte is checked before a tensor is handed out. RunError names what is damaged."""
    try:
        with Path(path).open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise RunError(f"weight bucket {path} cannot be read ({error}); the push has to be made again") from error
    magic, version, bucket, length, checksum = _HEADER.unpack_from(memory)
    encoded = memory[_HEADER.size : _HEADER.size + length]
    if magic != _MAGIC or zlib.crc32(encoded) != checksum:
        raise RunError(f"weight bucket {path} is damaged or not whole: its header does not fit its table")
    start = _payload_start(length)
    tensors = [(entry["name"], _tensor(memory, start, entry)) for entry in json.loads(encoded)]
    damaged = [
        entry["name"]
        for entry, (_, tensor) in zip(json.loads(encoded), tensors, strict=True)
        if zlib.crc32(_bytes_of(tensor)) != entry["crc32"]
    ]
    if damaged:
        raise RunError(
            f"bucket {bucket} of weight version {version} is corrupted: the checksum of {damaged[0]!r} (of "
            f"{len(damaged)} of {len(tensors)} tensors) is not the sender's"
        )
    return BucketContent(version, bucket, tensors)


def _payload_start(table_length: int) -> int:
    return -(-(_HEADER.size + table_length) // _ALIGNMENT) * _ALIGNMENT


def _tensor(memory: mmap.mmap, start: int, entry: dict) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    shape = torch.Size(entry["shape"])
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    # The tensor keeps the mapping alive.
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=start + entry["offset"]).view(shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
