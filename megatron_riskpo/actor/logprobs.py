"""Log-probs and entropy straight from hidden states: LM head and softmax in one vocabulary-parallel pass.

n positions, h hidden size, v vocabulary entries on this rank, c of them in a chunk; z = logits / temperature. Logits
exist a chunk of the vocabulary at a time, [n, c]. Chunks are of the vocabulary and not of the positions, so that each
chunk's rows of the weight gradient are final after one product: nothing has to be added up in a wider type.

The backward pass needs the logits once more. It computes them again, but for those of the first chunks, which wait in
the memory of the weight gradient: that much is needed in the end anyway, so the peak stays what it is.

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
"""Logits of a chunk, by device: 4 MiB in float32 stay in the caches of a core; a GPU needs more to be busy."""
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

    def add(self, scaled: Tensor, columns: Tensor, here: Tensor, shifted: Tensor, exponentials: Tensor) -> None:
        """Take in a chunk of z [n, c]; where `here`, the target is in `columns`. The last two are room to work in."""
        self.target += scaled.gather(1, columns[:, None])[:, 0] * here
        self.rebase(torch.maximum(self.maximum, scaled.amax(dim=1)))
        torch.sub(scaled, self.maximum[:, None], out=shifted)
        torch.exp(shifted, out=exponentials)
        self.exponentials += exponentials.sum(dim=1)
        self.weighted += exponentials.mul_(shifted).sum(dim=1)


@dataclass(frozen=True)
class _Plan:
    """Which entries of the vocabulary make a chunk, and where the logits of the first ones are kept."""

    num_rows: int
    width: int
    """Entries of a chunk; the last one may have fewer."""
    num_real: int
    num_kept: int
    """Entries whose logits are kept, a multiple of `width`."""

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, num_real: int) -> "_Plan":
        """The kept logits lie at the end of the weight gradient's memory. A chunk's gradient, c h numbers from the
        start on, must end before its own logits; that is so for all if it is so for the first and the last."""
        num_rows, (num_entries, hidden_size) = max(1, hidden.size(0)), weight.shape
        width = max(MIN_CHUNK_WIDTH, CHUNK_ELEMENTS[hidden.device.type] // num_rows)
        first = (num_entries - width) * hidden_size // num_rows
        last = num_entries - -(-num_rows * width // hidden_size)
        num_kept = max(0, min(first, last, num_real)) // width * width
        return cls(hidden.size(0), width, num_real, num_kept)

    def chunks(self) -> Iterator[slice]:
        starts = range(0, self.num_real, self.width)
        return (slice(start, min(start + self.width, self.num_real)) for start in starts)

    def place(self, memory: Tensor, chunk: slice) -> Tensor:
        """Where in the weight gradient's memory the chunk's logits [n, c] are kept."""
        start = memory.numel() + self.num_rows * (chunk.start - self.num_kept)
        return self.part(memory.view(-1)[start:], chunk)

    def part(self, memory: Tensor, chunk: slice) -> Tensor:
        """[n, c] at the start of flat memory."""
        num_columns = chunk.stop - chunk.start
        return memory[: self.num_rows * num_columns].view(self.num_rows, num_columns)

    def room(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Flat memory for one chunk."""
        return hidden.new_empty(self.num_rows * min(self.width, self.num_real), dtype=dtype)


def _put_logits(out: Tensor, hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """z [n, c] of a chunk's weights [c, h], into `out`."""
    return out.addmm_(hidden, weight.t(), beta=0, alpha=1 / temperature)


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


def _local_statistics(
    hidden: Tensor, weight: Tensor, columns: Tensor, plan: _Plan, temperature: float, memory: Tensor | None
) -> _Statistics:
    """Of this rank's vocabulary; the first logits are left in `memory`, if there is one."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    statistics = _Statistics.of_nothing(plan.num_rows, dtype, hidden.device)
    room = plan.room(hidden, hidden.dtype)
    shifted, exponentials = (plan.room(hidden, dtype) for _ in range(2))
    for chunk in plan.chunks():
        kept = memory is not None and chunk.start < plan.num_kept
        out = plan.place(memory, chunk) if kept else plan.part(room, chunk)
        logits = _put_logits(out, hidden, weight[chunk], temperature)
        statistics.add(logits, *_find(columns, chunk), plan.part(shifted, chunk), plan.part(exponentials, chunk))
    return statistics


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first_id: int, num_real: int, temperature: float,
        tp: ProcessGroup, backward_follows: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        columns, plan = targets - first_id, _Plan.of(hidden, weight, num_real)
        memory = weight.new_empty(weight.shape) if backward_follows and plan.num_kept else None
        local = _local_statistics(hidden, weight, columns, plan, temperature, memory)
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
        ctx.plan, ctx.temperature, ctx.memory = plan, temperature, memory
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
        # A second backward pass over a retained graph finds no kept logits.
        (memory, ctx.memory), plan = (ctx.memory, None), ctx.plan
        grad_hidden = torch.zeros_like(hidden, dtype=maximum.dtype)
        grad_weight = weight.new_empty(weight.shape) if memory is None else memory
        room = plan.room(hidden, hidden.dtype)
        for chunk in plan.chunks():
            if memory is not None and chunk.start < plan.num_kept:
                logits = plan.place(memory, chunk)
            else:
                logits = _put_logits(plan.part(room, chunk), hidden, weight[chunk], ctx.temperature)
            grad = _grad_logits(logits.to(maximum.dtype).sub_(maximum[:, None]), slope, offset)
            places, here = _find(columns, chunk)
            grad.scatter_add_(1, places[:, None], (at_target * here)[:, None])
            grad = grad.to(hidden.dtype)
            _add_product(grad_hidden, grad, weight[chunk])
            torch.mm(grad.t(), hidden, out=grad_weight[chunk])
        grad_weight[plan.num_real :] = 0
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None, None


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
    return _VocabParallelLogprobs.apply(  # type: ignore[return-value]
        hidden, weight, targets, first_id, num_real, temperature, tp, torch.is_grad_enabled()
    )
