"""Exact quantiles of scores that are spread over ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.algorithms.selection import NUM_BINS, NUM_ROUNDS, quantiles_of_sorted, select_quantiles

MAX_GATHERED = 2**20


def global_quantiles(
    scores: Float64[Tensor, " n"],
    levels: Sequence[float],
    group: ProcessGroup,
    *,
    largest_share: int | None = None,
    max_gathered: int = MAX_GATHERED,
) -> tuple[float, ...]:
    """inf{x : F(x) >= u} of all ranks' scores for each level u in (0, 1]; the same bits on every rank. Collective.

    `scores` are this rank's, on the CPU; ranks may hold different numbers of them, or none. No rank may hold more than
    `largest_share`, the same on every rank (N scores in even shares: ceil(N / ranks)); without it one small collective
    more asks for it. Shares padded to it are gathered and sorted while all of them together are at most `max_gathered`
    scores: ONE collective. Above that four rounds of a radix selection add up histograms: memory and bytes then do not
    depend on the number of scores. `communicated_bytes` counts both forms.

    Raises ValueError on every rank for NaN, for no score at all, and for a share larger than it may be.
    """
    if largest_share is None:
        largest_share = _largest(scores.numel(), group)
    if largest_share * group.size() > max_gathered:
        return select_quantiles(scores, levels, lambda counts: _add_up(counts, group))
    return quantiles_of_sorted(_gather(scores, largest_share, group).sort().values, levels)


def communicated_bytes(
    num_levels: int, num_ranks: int, largest_share: int, *, share_is_known: bool, max_gathered: int = MAX_GATHERED
) -> int:
    """Bytes that a rank hands to collectives in one call of `global_quantiles`.

    share_is_known: `largest_share` was an argument. A ring moves about 2 (num_ranks - 1) / num_ranks times as much
    per rank for what is added up, num_ranks - 1 times as much for what is gathered.
    """
    asking = 0 if share_is_known else 8
    if largest_share * num_ranks <= max_gathered:
        return asking + 8 * (1 + largest_share)
    return asking + 8 * NUM_BINS * (1 + (NUM_ROUNDS - 1) * num_levels)


def _largest(count: int, group: ProcessGroup) -> int:
    largest = torch.tensor([count])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def _gather(scores: Tensor, largest_share: int, group: ProcessGroup) -> Float64[Tensor, " total"]:
    """All ranks' scores. One message a rank: the number of its scores, the scores, padding."""
    message = torch.zeros(1 + largest_share, dtype=torch.float64)
    message[0] = scores.numel()
    message[1 : 1 + scores.numel()] = scores[:largest_share]
    messages = [torch.empty_like(message) for _ in range(group.size())]
    dist.all_gather(messages, message, group=group)
    counts = [int(received[0]) for received in messages]
    if max(counts) > largest_share:
        raise ValueError(f"a rank holds {max(counts)} scores, largest_share is {largest_share}: give the largest count")
    return torch.cat([received[1 : 1 + count] for received, count in zip(messages, counts, strict=True)])


def _add_up(counts: Tensor, group: ProcessGroup) -> Tensor:
    dist.all_reduce(counts, group=group)
    return counts
