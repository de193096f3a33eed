"""What TransformerEngine's kernels keep for the backward pass, where torch's operations on a CPU keep more.

For tensors without memory: nothing is computed. Context-parallel attention passes keys and values around in a ring
there, so a rank keeps its own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    """In the body norm, rotary embedding and attention of the actor are fused ones."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_riskpo.actor.attention import SDPACoreAttention
    from megatron_riskpo.actor.norm import RMSNorm

    with (
        mock.patch.object(RMSNorm, "forward", lambda norm, x: _FusedNorm.apply(x, norm.weight)),
        mock.patch.object(rope_utils, "_apply_rotary_pos_emb_thd", lambda t, *unused, **also: _FusedRotary.apply(t)),
        mock.patch.object(SDPACoreAttention, "_packed", lambda core, q, k, v, buckets: _FlashAttention.apply(q, k, v)),
    ):
        yield


class _FusedNorm(torch.autograd.Function):
    """Keeps its input and a float32 number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _FusedRotary(torch.autograd.Function):
    """Keeps nothing of its input."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return torch.empty_like(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.empty_like(gradients[0])


class _FlashAttention(torch.autograd.Function):
    """[t, n, h] and [t, g, h] -> [t, n * h]. Keeps its inputs, its output and a float32 number a token and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.size(0), query.size(1) * query.size(2))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])
