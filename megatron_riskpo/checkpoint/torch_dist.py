"""Tensors of a torch_dist checkpoint one slice at a time, in one process, without model or process groups.

The format's index (.metadata) is a pickle. It is read here with a list of the classes that may be in it, so that a
checkpoint from elsewhere runs no code; the tensors are read by torch.load's safe loader.
"""

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

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


class _IntoOne(DefaultLoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target


class TorchDistReader:
    """The tensors of a folder. Raises UsageError if there is no readable index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = _read_index(folder)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
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

    def read(self, key: str, at: tuple[int, ...] = ()) -> Tensor:
        """tensor[at]: `at` counts along the leading dimensions (layers, experts), along which files hold single slices.

        Raises RunError for a file that is missing or damaged.
        """
        entry = self._tensors[key]
        wanted = ChunkStorageMetadata(torch.Size([*at, *(0 for _ in entry.size[len(at) :])]),
                                      torch.Size([*(1 for _ in at), *entry.size[len(at) :]]))  # fmt: skip
        target = torch.empty(wanted.sizes, dtype=entry.properties.dtype)
        stored = TensorStorageMetadata(entry.properties, entry.size, self._chunks_at(key, at))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        num_read = sum(item.lengths.numel() for item in items)
        if num_read != target.numel():
            raise RunError(f"{self.folder}: {num_read} of the {target.numel()} elements of {key}{list(at)} are stored")
        try:
            self._reader.read_data(LoadPlan(items), _IntoOne(target)).wait()
        except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RunError(f"{self.folder}: {key} cannot be read: {reason}; take another checkpoint") from error
        return target.view(entry.size[len(at) :])

    def _chunks_at(self, key: str, at: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """The stored pieces of a slice; grouped once, since a search through those of all experts takes minutes."""
        if (key, len(at)) not in self._chunks:
            groups = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                groups[tuple(chunk.offsets[: len(at)])].append(chunk)
            self._chunks[key, len(at)] = groups
        return self._chunks[key, len(at)].get(at, [])


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
