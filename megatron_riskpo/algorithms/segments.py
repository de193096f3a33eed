"""Sums and means over responses. T = response tokens, flat, in the order of their n responses.

No atomics anywhere: the same numbers come out of every run, on a GPU too.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def segment_sum(values: Float[Tensor, " T"], lengths: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Sum of each of n runs of values; 0 for an empty run."""
    if not lengths.numel():
        # segment_reduce cannot do without a run. The slice is part of the graph, for backward.
        return values[:0]
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0)


def segment_mean(values: Float[Tensor, " T"], lengths: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Mean of each of n runs of values; 0 for an empty run."""
    return segment_sum(values, lengths) / lengths.clamp(min=1)


def spread(values: Float[Tensor, " n"], lengths: Int64[Tensor, " n"], num_tokens: int) -> Float[Tensor, " T"]:
    """Each response's value at each of its tokens; `num_tokens` = T spares a GPU from waiting for the lengths."""
    return values.repeat_interleave(lengths, output_size=num_tokens)


def count_kept(response_lengths: Int64[Tensor, " n"], keep: Bool[Tensor, " T"] | None) -> Int64[Tensor, " n"]:
    """Kept tokens of each response, all of them where `keep` is None."""
    return response_lengths if keep is None else segment_sum(keep.double(), response_lengths).long()
