"""Three ways to log-probs and entropy of a tensor-parallel vocabulary; logprobs.py compares them.

n positions, h hidden size, v vocabulary entries on this rank. Each way takes hidden states [n, h], the same on every
rank, and this rank's weights [v, h], and gives log-probs and entropies, both float32 [n]; the gradient of the hidden
states is added up over the ranks by Megatron's mapping around them. Import only where the CPU backend is in place.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.actor.logprobs import vocab_parallel_logprobs


@dataclass
class Inputs:
    """Of one rank."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    temperature: float
    tp: ProcessGroup
    entropy_in_loss: bool
    """Otherwise it is a metric, and takes no gradient."""

    def entropy_mode(self) -> AbstractContextManager:
        """For the ways whose entropy is apart: without a graph if none is needed."""
        return nullcontext() if self.entropy_in_loss else torch.no_grad()

    def logits(self) -> Tensor:
        """Whole on this rank, float32 [n, v], over the temperature."""
        hidden = copy_to_tensor_model_parallel_region(self.hidden, group=self.tp)
        return (hidden @ self.weight.t()).float().div_(self.temperature)


def chunked(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """This project's."""
    hidden = copy_to_tensor_model_parallel_region(inputs.hidden, group=inputs.tp)
    num_local = inputs.weight.size(0)
    return vocab_parallel_logprobs(
        hidden, inputs.weight, inputs.targets, inputs.tp.rank() * num_local, num_local, inputs.temperature, inputs.tp
    )


def plain(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """log_softmax by autograd; several ranks gather the vocabulary first."""
    logits = gather_from_tensor_model_parallel_region(inputs.logits(), group=inputs.tp)
    log_p = logits.log_softmax(dim=-1)
    with inputs.entropy_mode():
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, inputs.targets[:, None])[:, 0], entropy


def usual(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Megatron's cross-entropy, and the entropy by a function with a softmax of its own.

    The cross-entropy edits float32 logits, so the entropy comes first, and where it keeps them for its backward pass
    the cross-entropy gets a copy.
    """
    logits = inputs.logits()
    with inputs.entropy_mode():
        entropy: Tensor = _VocabParallelEntropy.apply(logits, inputs.tp)  # type: ignore[assignment]
    logprobs = -vocab_parallel_cross_entropy(logits.clone() if inputs.entropy_in_loss else logits, inputs.targets)
    return logprobs, entropy


class _VocabParallelEntropy(torch.autograd.Function):
    """As trainers on Megatron write it: softmax and logits are kept, and edited in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tp: ProcessGroup) -> Tensor:
        maximum = logits.max(dim=-1, keepdim=True).values
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp)
        exponentials = (logits - maximum).exp_()
        sums = exponentials.sum(dim=-1, keepdim=True)
        dist.all_reduce(sums, group=tp)
        softmax = exponentials.div_(sums)
        mean = (softmax * logits).sum(dim=-1, keepdim=True)
        dist.all_reduce(mean, group=tp)
        ctx.save_for_backward(logits, softmax, mean)
        return (maximum + sums.log() - mean).squeeze(dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, softmax, mean = ctx.saved_tensors
        centred = logits.sub_(mean)
        return softmax.mul_(centred).mul_(grad[:, None]).neg_(), None


WAYS: dict[str, Callable[[Inputs], tuple[Tensor, Tensor]]] = {"chunked": chunked, "plain": plain, "usual": usual}
