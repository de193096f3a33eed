"""A torch_dist checkpoint laid out slice by slice, and filled with bytes later: Megatron's dist_checkpointing loads it
under any layout."""

import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import skip_data

from megatron_riskpo.checkpoint.manifest import sync_to_disk
from megatron_riskpo.checkpoint.torch_dist import INDEX_FILE, locate

MAX_FILE_BYTES = 5 * 10**9
_DESCRIPTION = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
    "common_backend_version": 1,
}  # fmt: skip


@dataclass
class Contents:
    """What one writer has put into its files: its part of the index."""

    tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)
    objects: dict[str, BytesStorageMetadata] = field(default_factory=dict)
    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)


class TorchDistWriter:
    """Files of one of several writers in a folder, which exists; raises OSError."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self.contents = Contents()
        self._file: BinaryIO | None = None
        self._paths: list[Path] = []

    def reserve(
        self, key: str, at: tuple[int, ...], counts: tuple[int, ...], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> tuple[Path, int]:
        """Room for the slice [at] of a tensor that has `counts` such slices along its leading dimensions: the file and
        the offset where its bytes go."""
        sizes = torch.Size([*(1 for _ in at), *shape])
        offsets = torch.Size([*at, *(0 for _ in shape)])
        whole = torch.Size([*counts, *shape])
        entry = self.contents.tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype), whole, []))
        entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
        with skip_data():
            # torch.empty: memory that is not written takes no room.
            place = self._append(torch.empty(sizes, dtype=dtype))
        self.contents.places[MetadataIndex(key, offsets)] = place
        self._file.flush()
        return self._paths[-1], locate(self._file, place.offset, place.length)[0]

    def add_empty_object(self, key: str, at: tuple[int, ...], counts: tuple[int, ...]) -> None:
        """Write what a module without state of its own has under `key`: Megatron's loader asks for it."""
        name = f"{key}/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, counts))}"
        self.contents.objects[name] = BytesStorageMetadata()
        # A list, in which Megatron's strategy puts objects.
        self.contents.places[MetadataIndex(name)] = self._append([None])

    def flush(self) -> None:
        """After the last reservation: all that this writer writes itself is in the files."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def sync(self) -> None:
        """After the bytes have been filled in: to the disk."""
        for path in self._paths:
            sync_to_disk(path)

    def _append(self, value: Any) -> _StorageInfo:
        if self._file is None or self._file.seek(0, os.SEEK_END) > MAX_FILE_BYTES:
            self.flush()
            self._paths.append(self.folder / f"__{self.rank}_{len(self._paths)}.distcp")
            self._file = self._paths[-1].open("wb+")
        start = self._file.seek(0, os.SEEK_END)
        torch.save(value, self._file)
        end = self._file.tell()
        return _StorageInfo(self._paths[-1].name, start, end - start)


def write_index(folder: Path, parts: Sequence[Contents]) -> None:
    """Write the index of what the writers have put into a folder, and what Megatron looks for beside it."""
    tensors: dict[str, TensorStorageMetadata] = {}
    for part in parts:
        for key, entry in part.tensors.items():
            whole = tensors.setdefault(key, TensorStorageMetadata(entry.properties, entry.size, []))
            whole.chunks.extend(entry.chunks)
    entries = tensors | {key: entry for part in parts for key, entry in part.objects.items()}
    places = {index: place for part in parts for index, place in part.places.items()}
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_DESCRIPTION))
    with (folder / INDEX_FILE).open("wb") as file:
        pickle.dump(Metadata(entries, storage_data=places, version="1.0.0"), file)
