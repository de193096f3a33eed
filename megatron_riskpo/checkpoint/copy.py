"""Moves rows from files into their places in other files, a block in memory at a time, or none."""

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from megatron_riskpo.checkpoint.rows import RowReader, Rows, byte_ranges, ends_early


@dataclass(frozen=True)
class Copy:
    """A tensor, and where its bytes go."""

    rows: Rows
    dtype: torch.dtype
    """There; values are rounded to it."""
    path: Path
    """A file that exists."""
    offset: int


def run_copies(copies: Iterable[Copy]) -> None:
    """Make all copies in their order: files that grow from front to back are written faster.

    Raises RunError (a source ends early) and OSError (a full disk, with the file's name).
    """
    reader = RowReader()
    for copy in copies:
        try:
            _run(copy, reader)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.filename = str(copy.path)
            raise


def _run(copy: Copy, reader: RowReader) -> None:
    # Unbuffered, so that what is sent comes after what is written.
    with copy.path.open("rb+", buffering=0) as target:
        target.seek(copy.offset)
        ranges = byte_ranges(copy.rows) if copy.rows.dtype == copy.dtype else None
        if ranges is not None:
            for path, offset, num_bytes in ranges:
                _send(path, offset, num_bytes, target)
            return
        for block in reader.blocks(copy.rows):
            content = memoryview(_cast(block, copy.rows.dtype, copy.dtype))
            while content:
                content = content[target.write(content) :]


def _send(path: Path, offset: int, num_bytes: int, target: BinaryIO) -> None:
    """From file to file within the system, without a copy in this process's memory."""
    with path.open("rb", buffering=0) as source:
        end = offset + num_bytes
        while offset < end:
            count = os.sendfile(target.fileno(), source.fileno(), offset, end - offset)
            if count == 0:
                raise ends_early(path, end - offset)
            offset += count


def _cast(block: np.ndarray, source: torch.dtype, target: torch.dtype) -> np.ndarray:
    if source == target:
        return block
    return torch.from_numpy(block).view(source).to(target).view(torch.uint8).numpy()
