"""Tensors as rows of bytes in files, read a block at a time: memory does not grow with a tensor.

A conversion moves rows: fused parameters are their parts' rows in another order, and a checkpoint of several ranks has
rows, and parts of rows, in several files.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from megatron_riskpo.errors import RunError

BLOCK_BYTES = 2**20
"""Of rows in memory at a time; a longer row makes a larger block."""


@dataclass(frozen=True)
class Block:
    """A rectangle of a tensor, whose rows lie one after the other in a file. Columns are bytes of a row."""

    path: Path
    offset: int
    """Of its first byte in the file."""
    row: int
    num_rows: int
    column: int
    num_columns: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor in files; its rows are the entries of its first dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    """They cover it, none lies over another."""

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    def runs(self) -> tuple["Run", ...]:
        """All its rows, in order."""
        return (Run(self, 0, self.num_rows),)


@dataclass(frozen=True)
class Run:
    """Rows start .. stop - 1 of a tensor."""

    tensor: StoredTensor
    start: int
    stop: int


@dataclass(frozen=True)
class Rows:
    """A tensor put together of rows of stored ones, all of one dtype and one length."""

    name: str
    runs: tuple[Run, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.runs[0].tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.runs[0].tensor
        return (sum(run.stop - run.start for run in self.runs), *first.shape[1:]) if first.shape else ()

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def byte_ranges(rows: Rows) -> list[tuple[Path, int, int]] | None:
    """(file, offset, length) of the pieces that are the tensor when laid end to end; None if rows are cut."""
    ranges = []
    for run in rows.runs:
        size = run.tensor.row_bytes
        for block in sorted(run.tensor.blocks, key=lambda block: block.row):
            first, last = max(run.start, block.row), min(run.stop, block.row + block.num_rows)
            if first >= last:
                continue
            if block.num_columns != size:
                return None
            ranges.append((block.path, block.offset + (first - block.row) * size, (last - first) * size))
    return ranges


def ends_early(path: Path, num_missing: int) -> RunError:
    return RunError(f"{path} ends {num_missing} bytes early; copy it again, or take another checkpoint")


class RowReader:
    """Reads through a buffer that is used again for each block: one reader a thread."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self._scratch = np.empty(0, np.uint8)
        self._files: dict[Path, int] = {}

    def blocks(self, rows: Rows) -> Iterator[np.ndarray]:
        """uint8 arrays, each valid until the next: blocks of as many rows whatever the runs, the last one shorter.

        Raises RunError for a file that ends early, OSError for one that is not read.
        """
        if not rows.num_bytes:
            return
        row_bytes = rows.runs[0].tensor.row_bytes
        capacity = max(1, BLOCK_BYTES // row_bytes)
        self._buffer = _at_least(self._buffer, min(capacity * row_bytes, rows.num_bytes))
        try:
            yield from self._blocks(rows, row_bytes, capacity)
        finally:
            # A checkpoint of many ranks has more files than a process may have open.
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _blocks(self, rows: Rows, row_bytes: int, capacity: int) -> Iterator[np.ndarray]:
        filled = 0
        for run in rows.runs:
            start = run.start
            while start < run.stop:
                count = min(run.stop - start, capacity - filled)
                self._fill(run.tensor, start, self._buffer[filled * row_bytes : (filled + count) * row_bytes])
                filled, start = filled + count, start + count
                if filled == capacity:
                    yield self._buffer[: filled * row_bytes]
                    filled = 0
        if filled:
            yield self._buffer[: filled * row_bytes]

    def _fill(self, tensor: StoredTensor, start: int, out: np.ndarray) -> None:
        """The rows from `start` on, as many as `out` holds."""
        table = out.reshape(-1, tensor.row_bytes)
        for block in tensor.blocks:
            first, last = max(start, block.row), min(start + len(table), block.row + block.num_rows)
            if first >= last:
                continue
            offset = block.offset + (first - block.row) * block.num_columns
            place = table[first - start : last - start, block.column : block.column + block.num_columns]
            if block.num_columns == tensor.row_bytes:
                self._read(block.path, offset, place.reshape(-1))
                continue
            self._scratch = _at_least(self._scratch, place.size)
            piece = self._scratch[: place.size]
            self._read(block.path, offset, piece)
            place[:] = piece.reshape(place.shape)

    def _read(self, path: Path, offset: int, out: np.ndarray) -> None:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        done = 0
        while done < out.size:
            count = os.preadv(self._files[path], [out[done:]], offset + done)
            if count == 0:
                raise ends_early(path, out.size - done)
            done += count


def _at_least(buffer: np.ndarray, size: int) -> np.ndarray:
    return buffer if buffer.size >= size else np.empty(size, np.uint8)


def runs_of(order: torch.Tensor, tensors: Sequence[StoredTensor]) -> tuple[Run, ...]:
    """The runs in an order of row numbers, where tensor i's rows are numbered on from `first_numbers(tensors)[i]`."""
    numbers, firsts = order.numpy(), first_numbers(tensors)
    breaks = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    runs = []
    for start, stop in zip([0, *breaks], [*breaks, len(numbers)], strict=True):
        index = int(np.searchsorted(firsts, numbers[start], side="right")) - 1
        row = int(numbers[start]) - firsts[index]
        runs.append(Run(tensors[index], row, row + stop - start))
    return tuple(runs)


def check_reordered(numbers: torch.Tensor, fused: torch.Tensor, name: str) -> None:
    """Raise RunError unless a fusion of row numbers has put them in another order, and done nothing else."""
    if fused.ndim != 1 or not torch.equal(fused.sort().values, numbers):
        raise RunError(f"{name}: its family's table does more than reorder rows, which the converter cannot follow")


def first_numbers(tensors: Sequence[StoredTensor]) -> list[int]:
    """Numbers of the first rows, with a gap between tensors: no run goes from one to the next."""
    firsts, at = [], 0
    for tensor in tensors:
        firsts.append(at)
        at += tensor.num_rows + 1
    return firsts
