"""The frozen reference model of a KL penalty: its weights on the host, in the policy's place for a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class ReferenceWeights:
    """A host copy of a model's parameters as they are now (of this rank's part: nothing is gathered).

    The device never holds two models, the host holds one copy at a time: it changes places with the policy.
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

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, host in zip(self._parameters, self._swapped_out, strict=True):
            # Into the same memory: Megatron's buffers and optimizers hold views of it.
            present = parameter.detach().clone()
            parameter.copy_(host)
            host.copy_(present)


def _host_copy(parameter: nn.Parameter) -> torch.Tensor:
    # Page-locked where there is a GPU: pageable memory is several times slower to copy.
    copy = torch.empty_like(parameter, device="cpu", requires_grad=False, pin_memory=parameter.is_cuda)
    return copy.copy_(parameter.detach())
