"""A torch_dist checkpoint written slice by slice, in one process: Megatron's dist_checkpointing loads it under any
layout."""

import json
import pickle
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_riskpo.checkpoint.torch_dist import INDEX_FILE

MAX_FILE_BYTES = 5 * 10**9
_DESCRIPTION = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
    "common_backend_version": 1,
}  # fmt: skip


class TorchDistWriter:
    """Tensors into `folder`, which exists; raises OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None
        self._num_files = 0
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, at: tuple[int, ...], counts: tuple[int, ...], piece: Tensor) -> None:
        """Write the slice [at] of a tensor that has `counts` such slices along its leading dimensions."""
        shape = torch.Size([*(1 for _ in at), *piece.shape])
        offsets = torch.Size([*at, *(0 for _ in piece.shape)])
        size = torch.Size([*counts, *piece.shape])
        entry = self._entries.setdefault(key, TensorStorageMetadata(TensorProperties(piece.dtype), size, []))
        cast(TensorStorageMetadata, entry).chunks.append(ChunkStorageMetadata(offsets, shape))
        self._places[MetadataIndex(key, offsets)] = self._append(piece.reshape(shape))

    def add_empty_object(self, key: str, at: tuple[int, ...], counts: tuple[int, ...]) -> None:
        """Write what a module without state of its own has under `key`: Megatron's loader asks for it."""
        name = f"{key}/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, counts))}"
        self._entries[name] = BytesStorageMetadata()
        # A list, in which Megatron's strategy puts objects.
        self._places[MetadataIndex(name)] = self._append([None])

    def finish(self) -> None:
        """Write the index, and what Megatron looks for beside it."""
        if self._file is not None:
            self._file.close()
        torch.save({}, self.folder / "common.pt")
        (self.folder / "metadata.json").write_text(json.dumps(_DESCRIPTION))
        index = Metadata(self._entries, storage_data=self._places, version="1.0.0")
        with (self.folder / INDEX_FILE).open("wb") as file:
            pickle.dump(index, file)

    def _append(self, value: Any) -> _StorageInfo:
        if self._file is None or self._file.tell() > MAX_FILE_BYTES:
            if self._file is not None:
                self._file.close()
            self._file = (self.folder / f"__0_{self._num_files}.distcp").open("wb")
            self._num_files += 1
        start = self._file.tell()
        torch.save(value, self._file)
        return _StorageInfo(Path(self._file.name).name, start, self._file.tell() - start)
