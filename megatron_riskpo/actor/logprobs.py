"""Log-probs and entropy of vocabulary-parallel logits, in one pass over the vocabulary.

n positions, v = vocabulary entries on this rank. Per position two collectives over the tensor-parallel group carry
four numbers: the maximum, then (sum of exponentials, their logit-weighted sum, the target's logit). The float32
copy of the logits exists one chunk at a time, the inputs are never edited, and the backward pass recomputes the
softmax instead of keeping it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_ELEMENTS = 2**24
"""Logits turned to float32 at a time: 64 MiB."""


def _row_chunks(logits: Tensor) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(1, logits.size(1)))
    return [slice(start, start + rows) for start in range(0, logits.size(0), rows)]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """A float32 copy over the temperature; a copy even of float32 logits, so that it may be worked on in place."""
    return logits.to(torch.float32, copy=True).div_(temperature)


def _local_targets(targets: Tensor, first_id: int, num_ids: int) -> tuple[Tensor, Tensor]:
    """Target columns on this rank (0 where elsewhere), and whether they are here."""
    here = (targets >= first_id) & (targets < first_id + num_ids)
    return torch.where(here, targets - first_id, 0), here


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first_id: int, temperature: float, tp: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        num_rows = logits.size(0)
        maximum = logits.amax(dim=1).float() / temperature
        if tp.size() > 1:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp)
        columns, here = _local_targets(targets, first_id, logits.size(1))
        sums = torch.empty(3, num_rows, dtype=torch.float32, device=logits.device)
        for rows in _row_chunks(logits):
            shifted = _scaled(logits[rows], temperature).sub_(maximum[rows, None])
            sums[2, rows] = shifted.gather(1, columns[rows, None])[:, 0] * here[rows]
            exponentials = shifted.exp()
            sums[0, rows] = exponentials.sum(dim=1)
            sums[1, rows] = exponentials.mul_(shifted).sum(dim=1)
        if tp.size() > 1:
            dist.all_reduce(sums, group=tp)
        log_sum = sums[0].log()
        mean_shifted = sums[1] / sums[0]
        ctx.save_for_backward(logits, columns, here, maximum + log_sum, maximum + mean_shifted)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return sums[2] - log_sum, log_sum - mean_shifted

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        """d logp / dz = onehot - p;  d entropy / dz = -p (z - E z);  z = logits / temperature."""
        logits, columns, here, log_normalizer, mean_scaled = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            scaled = _scaled(logits[rows], ctx.temperature)
            probs = (scaled - log_normalizer[rows, None]).exp_()
            chunk = torch.zeros_like(scaled)
            if grad_entropy is not None:
                chunk.sub_(probs * (scaled - mean_scaled[rows, None]) * grad_entropy[rows, None])
            if grad_logprobs is not None:
                chunk.sub_(probs.mul_(grad_logprobs[rows, None]))
                chunk.scatter_add_(1, columns[rows, None], (grad_logprobs[rows] * here[rows])[:, None])
            grad[rows] = chunk.div_(ctx.temperature)
        return grad, None, None, None, None


def vocab_parallel_logprobs(
    logits: Tensor, targets: Tensor, first_id: int, temperature: float, tp: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution, in nats, equal on all ranks of `tp`.

    logits [n, v] hold the vocabulary entries first_id .. first_id + v - 1; targets [n] are global ids.
    Both outputs are float32 [n] and differentiable; an output that is not used costs nothing in the backward pass.
    """
    return _VocabParallelLogprobs.apply(logits, targets, first_id, temperature, tp)  # type: ignore[return-value]
