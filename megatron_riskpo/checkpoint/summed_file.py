"""Files whose checksum is taken while they are written: they need not be read again, from another machine perhaps."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_riskpo.checkpoint.manifest import FileEntry, new_digest


class SummedFile(io.BufferedWriter):
    """A new file that is written from its start to its end, without seeking."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._digest, self._size = new_digest(), 0

    def write(self, data: Any, /) -> int:
        """data: bytes-like."""
        self._digest.update(data)
        written = super().write(data)
        self._size += written
        return written

    @property
    def entry(self) -> FileEntry:
        """Of what was written so far."""
        return FileEntry(self._size, self._digest.hexdigest())


class SummingFileSystem(FileSystem):
    """The file system of torch's checkpoint writer; `entries` has each file that was written, by name."""

    def __init__(self) -> None:
        self.entries: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[SummedFile]:  # type: ignore[override]
        """Only for writing."""
        with SummedFile(Path(path)) as stream:
            yield stream
        self.entries[Path(path).name] = stream.entry
