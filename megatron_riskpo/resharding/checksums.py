"""A sum over the bits of a tensor that changes with any changed number, and with its place."""

import torch
from torch import Tensor

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20


def bits_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bits as integers of its elements' size; a view."""
    return tensor.view(_INTEGER[tensor.element_size()])


def checksum(message: Tensor) -> Tensor:
    """int64 []: sum of bits * (2 i + 1) modulo 2^64 over the elements i of a contiguous tensor.

    The factors are odd, so that one changed element always changes the sum; the same on CPU and GPU. Takes memory for
    2^20 elements at a time.
    """
    bits = bits_of(message.reshape(-1))
    total = torch.zeros((), dtype=torch.int64, device=message.device)
    for index, chunk in enumerate(bits.split(_CHUNK)):
        factors = torch.arange(chunk.numel(), device=message.device) + index * _CHUNK
        total += (chunk.to(torch.int64) * (2 * factors + 1)).sum()
    return total
