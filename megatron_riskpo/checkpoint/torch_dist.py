"""Where the tensors of a torch_dist checkpoint lie in its files; one process, without model or process groups.

The format's index (.metadata) is a pickle. It is read here with a list of the classes that may be in it, so that a
checkpoint from elsewhere runs no code; the tensors are read as bytes, their descriptions by torch.load's safe loader.
"""

import pickle
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_riskpo.checkpoint.rows import Block, StoredTensor
from megatron_riskpo.errors import RunError, UsageError

INDEX_FILE = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class TorchDistReader:
    """The tensors of a folder. Raises UsageError if there is no readable index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = _read_index(folder)
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def stored(self, key: str, at: tuple[int, ...] = ()) -> StoredTensor:
        """tensor[at]: `at` counts along the leading dimensions (layers, experts), along which files hold single slices.

        Raises RunError for a file that is missing or damaged, as far as the places of the bytes tell.
        """
        entry = self._tensors[key]
        dtype, shape = entry.properties.dtype, tuple(entry.size[len(at) :])
        blocks = [self._block(key, chunk, len(at), dtype) for chunk in self._chunks_at(key, at)]
        num_stored = sum(block.num_rows * block.num_columns for block in blocks) // dtype.itemsize
        if num_stored != prod(shape):
            raise RunError(f"{self.folder}: {num_stored} of the {prod(shape)} elements of {key}{list(at)} are stored")
        return StoredTensor(key, dtype, shape, tuple(blocks))

    def _block(self, key: str, chunk: ChunkStorageMetadata, num_leading: int, dtype: torch.dtype) -> Block:
        offsets, sizes = chunk.offsets[num_leading:], chunk.sizes[num_leading:]
        size = self._tensors[key].size[num_leading:]
        if prod(chunk.sizes[:num_leading]) != 1 or sizes[2:] != size[2:]:
            raise RunError(f"{self.folder}: {key} is cut into pieces {list(chunk.sizes)} of {list(self.shape(key))}, "
                           "which this version does not read")  # fmt: skip
        place = self._places[MetadataIndex(key, chunk.offsets)]
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                offset, tensor = locate(file, place.offset, place.length)
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RunError(f"{self.folder}: {key} cannot be read: {reason}; take another checkpoint") from error
        if tensor.shape != chunk.sizes or tensor.dtype != dtype or not tensor.is_contiguous():
            raise RunError(f"{path}: {key} is not as the index says; take another checkpoint")
        of_column = prod(size[2:]) * dtype.itemsize
        row, num_rows = (offsets[0], sizes[0]) if sizes else (0, 1)
        column, num_columns = (offsets[1], sizes[1]) if len(sizes) > 1 else (0, 1)
        return Block(path, offset, row, num_rows, column * of_column, num_columns * of_column)

    def _chunks_at(self, key: str, at: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """The stored pieces of a slice; grouped once, since a search through those of all experts takes minutes."""
        if (key, len(at)) not in self._chunks:
            groups = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                groups[tuple(chunk.offsets[: len(at)])].append(chunk)
            self._chunks[key, len(at)] = groups
        return self._chunks[key, len(at)].get(at, [])


def locate(file: BinaryIO, start: int, length: int) -> tuple[int, Tensor]:
    """Of the one tensor that torch.save wrote into these bytes of a file: where its own bytes begin, and the tensor
    without them (on the meta device)."""
    view = _create_file_view(file, start, length)
    tensor = torch.load(view, map_location="meta", weights_only=True)
    if not isinstance(tensor, Tensor):
        raise RuntimeError(f"a {type(tensor).__name__} is stored in place of a tensor")
    storage_start: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]
    return start + storage_start + int(tensor.storage_offset()) * tensor.element_size(), tensor


def _read_index(folder: Path) -> Metadata:
    file = folder / INDEX_FILE
    try:
        with file.open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
    except FileNotFoundError:
        raise UsageError(f"{folder}: no {INDEX_FILE}, so no torch_dist checkpoint; give a run's folder, "
                         "or one checkpoints/step_N of it") from None  # fmt: skip
    except (OSError, pickle.UnpicklingError, AttributeError, EOFError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"{file} is not read: {error}; take a checkpoint that `riskpo train` wrote") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise UsageError(f"{file} is no index of a torch_dist checkpoint; take one that `riskpo train` wrote")
    return metadata
