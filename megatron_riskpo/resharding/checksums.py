"""A sum over the bits of a tensor that changes with any changed number, and with its place."""

import torch
from torch import Tensor

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20


def bits_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bits as integers of its elements' size; a view."""
    return tensor.view(_INTEGER[tensor.element_size()])


def checksum(*parts: Tensor) -> Tensor:
    """int64 []: sum of bits * (2 i + 1) modulo 2^64 over the elements i of the tensors, row by row, one after the
    other.

    The factors are odd, so that one changed element always changes the sum; the same on CPU and GPU. Takes memory for
    2^20 elements, or a row, at a time.
    """
    total, start = torch.zeros((), dtype=torch.int64, device=parts[0].device), 0
    for part in parts:
        row = part.numel() // max(1, len(part))
        for rows in part.split(max(1, _CHUNK // max(1, row))):
            bits = bits_of(rows.reshape(-1)).to(torch.int64)
            factors = torch.arange(start, start + len(bits), device=bits.device)
            total += (bits * (2 * factors + 1)).sum()
            start += len(bits)
    return total
