"""The frozen reference model of a KL penalty: its weights on the host, in the policy's place for a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_riskpo.algorithms.config import PolicyLossConfig


class ReferenceWeights:
    """A host copy of a model's parameters as they are now (of this rank's part: nothing is gathered).

    The device never holds two models, the host holds one copy at a time: it changes places with the policy, on the
    device through a copy of one parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._swapped_out = [_host_copy(parameter) for parameter in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the reference weights in the body, and afterwards its own again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, host in zip(self._parameters, self._swapped_out, strict=True):
            _exchange(parameter, host)


def reference_weights(model: nn.Module, loss: PolicyLossConfig) -> ReferenceWeights | None:
    """The model as it is now, where the loss has a KL penalty; without one None, and no copy is made."""
    return ReferenceWeights(model) if loss.kl_coefficient else None


@torch.no_grad()
def _exchange(parameter: nn.Parameter, host: Tensor) -> None:
    """A function of its own: in the loop the last parameter's copy would live until the next one's is made."""
    present = parameter.detach().clone()
    # Into the same memory: Megatron's buffers and optimizers hold views of it.
    parameter.copy_(host)
    host.copy_(present)


def _host_copy(parameter: nn.Parameter) -> Tensor:
    # Page-locked where there is a GPU: pageable memory is several times slower to copy.
    copy = torch.empty_like(parameter, device="cpu", requires_grad=False, pin_memory=parameter.is_cuda)
    return copy.copy_(parameter.detach())
