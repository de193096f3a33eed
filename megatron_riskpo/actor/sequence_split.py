"""Which rank of a context-parallel group holds which tokens of a pack.

Zig-zag, as Megatron and TransformerEngine have it: a sequence is cut into 2 * cp_size equal chunks, and rank r holds
chunk r and chunk 2 * cp_size - 1 - r. Under causal attention early chunks are cheap and late ones dear; so all ranks
do equal work.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceSplit:
    """How one rank's share of each packed sequence comes about."""

    cp_size: int = 1
    cp_rank: int = 0
    sequence_parallel_size: int = 1
    """Ranks over which sequence parallelism splits a rank's tokens once more; 1 without it."""

    @property
    def sequence_multiple(self) -> int:
        """What a sequence's length must divide by."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """What a pack's length must divide by."""
        return self.sequence_multiple * self.sequence_parallel_size


def zigzag(lengths: Tensor, cp_size: int) -> tuple[Tensor, Tensor]:
    """int64 [t] each: the rank that holds a token of the pack, and the token's place among that rank's tokens.

    lengths, int64 [sequences], must divide by 2 * cp_size (by 1 if cp_size is 1) and sum to t.
    """
    starts = lengths.cumsum(0) - lengths
    offset = torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)
    if cp_size == 1:
        return torch.zeros_like(offset), torch.arange(offset.numel(), device=lengths.device)
    chunk_size = (lengths // (2 * cp_size)).repeat_interleave(lengths)
    chunk = offset // chunk_size
    is_late = chunk >= cp_size
    owner = torch.where(is_late, 2 * cp_size - 1 - chunk, chunk)
    place = (starts // cp_size).repeat_interleave(lengths) + offset % chunk_size + is_late * chunk_size
    return owner, place
