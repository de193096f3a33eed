"""Log-probs and entropy straight from hidden states: LM head and softmax in one vocabulary-parallel pass.

n positions, h hidden size, v vocabulary entries on this rank, c of them in a chunk; z = logits / temperature. Logits
exist for one chunk of the vocabulary at a time, [n, c], in the forward pass and again in the backward pass, which
computes them once more instead of keeping them. Chunks are of the vocabulary and not of the positions, so that each
chunk's rows of the weight gradient are final after one product: nothing has to be added up in a wider type.

Two collectives over the tensor-parallel group in all: the maximum, then three sums a position.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Logits of a chunk, by device: 4 MiB in float32 stay in the cache of a core; a GPU needs more to be busy."""
MIN_CHUNK_WIDTH = 256
"""Entries of the vocabulary in a chunk however many positions there are: narrower products are slow."""


@dataclass
class _Statistics:
    """Of z over the vocabulary entries seen so far; each float32 [n]."""

    maximum: Tensor
    exponentials: Tensor
    """Sum of exp(z - maximum)."""
    weighted: Tensor
    """Sum of exp(z - maximum) (z - maximum)."""
    target: Tensor
    """z of the target, 0 until it is seen."""

    @classmethod
    def of_nothing(cls, num_rows: int, dtype: torch.dtype, device: torch.device) -> "_Statistics":
        # Not -inf: a rank that holds padding only multiplies the difference of two maxima by a sum of 0.
        maximum = torch.full((num_rows,), torch.finfo(dtype).min, dtype=dtype, device=device)
        return cls(maximum, *torch.zeros(3, num_rows, dtype=dtype, device=device).unbind())

    def rebase(self, maximum: Tensor) -> None:
        """Refer the sums to another maximum, not less than the present one."""
        shift = self.maximum - maximum
        factor = shift.exp()
        self.weighted = factor * (self.weighted + shift * self.exponentials)
        self.exponentials = factor * self.exponentials
        self.maximum = maximum

    def add(self, scaled: Tensor, columns: Tensor, here: Tensor) -> None:
        """Take in a chunk of z [n, c], which is overwritten; where `here`, the target is in `columns`."""
        self.target += scaled.gather(1, columns[:, None])[:, 0] * here
        self.rebase(torch.maximum(self.maximum, scaled.amax(dim=1)))
        shifted = scaled.sub_(self.maximum[:, None])
        exponentials = shifted.exp()
        self.exponentials += exponentials.sum(dim=1)
        self.weighted += exponentials.mul_(shifted).sum(dim=1)


def _chunks(hidden: Tensor, num_real: int) -> Iterator[slice]:
    width = max(MIN_CHUNK_WIDTH, CHUNK_ELEMENTS[hidden.device.type] // max(1, hidden.size(0)))
    return (slice(start, min(start + width, num_real)) for start in range(0, num_real, width))


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """z [n, c] of a chunk's weights [c, h], in float32 or wider, free to be overwritten."""
    logits = hidden.new_empty(hidden.size(0), weight.size(0))
    logits.addmm_(hidden, weight.t(), beta=0, alpha=1 / temperature)
    return logits.to(_wide(hidden))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _find(columns: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Target columns within the chunk (0 where elsewhere), and whether they are in it."""
    here = (columns >= chunk.start) & (columns < chunk.stop)
    return torch.where(here, columns - chunk.start, 0), here


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total may be of a wider type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first_id: int, num_real: int, temperature: float,
        tp: ProcessGroup,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        columns = targets - first_id
        local = _Statistics.of_nothing(hidden.size(0), _wide(hidden), hidden.device)
        for chunk in _chunks(hidden, num_real):
            local.add(_scaled_logits(hidden, weight[chunk], temperature), *_find(columns, chunk))
        maximum = local.maximum.clone()
        if tp.size() > 1:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp)
        local.rebase(maximum)
        sums = torch.stack([local.exponentials, local.weighted, local.target])
        if tp.size() > 1:
            dist.all_reduce(sums, group=tp)
        exponentials, weighted, target = sums
        mean_shifted = weighted / exponentials
        ctx.save_for_backward(hidden, weight, columns, maximum, exponentials, mean_shifted)
        ctx.num_real, ctx.temperature = num_real, temperature
        # An output that the loss does not use has the gradient None, and costs nothing.
        ctx.set_materialize_grads(False)
        log_sum = exponentials.log()
        return target - maximum - log_sum, log_sum - mean_shifted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        """With p = exp(z - maximum) / exponentials: d logp / dz = onehot - p, d entropy / dz = -p (z - E z)."""
        hidden, weight, columns, maximum, exponentials, mean_shifted = ctx.saved_tensors
        at_target = torch.zeros_like(maximum) if grad_logprobs is None else grad_logprobs / ctx.temperature
        slope = None if grad_entropy is None else -grad_entropy / (ctx.temperature * exponentials)
        offset = -at_target / exponentials
        if slope is not None:
            offset -= slope * mean_shifted
        grad_hidden = torch.zeros_like(hidden, dtype=maximum.dtype)
        grad_weight = torch.empty_like(weight)
        grad_weight[ctx.num_real :] = 0
        for chunk in _chunks(hidden, ctx.num_real):
            shifted = _scaled_logits(hidden, weight[chunk], ctx.temperature).sub_(maximum[:, None])
            grad = _grad_logits(shifted, slope, offset)
            places, here = _find(columns, chunk)
            grad.scatter_add_(1, places[:, None], (at_target * here)[:, None])
            grad = grad.to(hidden.dtype)
            _add_product(grad_hidden, grad, weight[chunk])
            torch.mm(grad.t(), hidden, out=grad_weight[chunk])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None


def _grad_logits(shifted: Tensor, slope: Tensor | None, offset: Tensor) -> Tensor:
    """exp(shifted) (slope shifted + offset), slope and offset [n]; `shifted` [n, c] is overwritten."""
    if slope is None:
        return shifted.exp_().mul_(offset[:, None])
    exponentials = shifted.exp()
    return shifted.mul_(slope[:, None]).add_(offset[:, None]).mul_(exponentials)


def vocab_parallel_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, first_id: int, num_real: int, temperature: float, tp: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution, in nats, equal on all ranks of `tp`.

    hidden [n, h] is the same on all ranks; weight [v, h] holds the vocabulary entries first_id .. first_id + v - 1, of
    which those from num_real on are padding and take no probability; targets [n] are global ids. Both outputs are
    float32 [n] (float64 of float64 inputs) and differentiable; one that is not used costs nothing in the backward pass.
    No input is edited. The gradient of `hidden` is this rank's part of a sum over `tp`: the caller adds them up.
    """
    return _VocabParallelLogprobs.apply(hidden, weight, targets, first_id, num_real, temperature, tp)  # type: ignore[return-value]
