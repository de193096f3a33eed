"""The optimizer's state on the host while it is not needed: 12 bytes a parameter with float32 main weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_riskpo.actor.optimizer import inner_optimizers

_MAIN_WEIGHTS = ("fp32_from_float16_groups", "shard_fp32_from_float16_groups")
"""Where Megatron's two mixed-precision optimizers keep their float32 main weights."""


class OffloadedState:
    """The moments and the float32 main weights of an optimizer, on the device only inside `on_device`.

    Megatron's own offload_to_cpu replaces `.data`, which for float32 models cuts a distributed optimizer's shards off
    the parameters they are views of. Here a tensor keeps its identity: only its memory is given back and taken again.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._optimizer = optimizer
        self._on_host: list[tuple[Tensor, Tensor]] = []
        self._move_to_host()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The state is there in the body."""
        self._move_back()
        try:
            yield
        finally:
            self._move_to_host()

    def _move_to_host(self) -> None:
        for tensor in state_tensors(self._optimizer):
            # Page-locked where there is a GPU: pageable memory is several times slower to copy.
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
            tensor.untyped_storage().resize_(0)
            self._on_host.append((tensor, copy))

    def _move_back(self) -> None:
        while self._on_host:
            tensor, copy = self._on_host.pop()
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            tensor.copy_(copy)


def state_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Tensors with memory of their own; a state that does not exist yet (before the first step) is not among them."""
    for inner in inner_optimizers(optimizer):
        # A rank whose share of the parameters is empty has no optimizer.
        states = inner.optimizer.state.values() if inner.optimizer is not None else ()
        for state in states:
            yield from (t.detach() for t in state.values() if isinstance(t, Tensor) and t.dim() > 0)
        for name in _MAIN_WEIGHTS:
            for group in getattr(inner, name, []):
                yield from (weight.detach() for weight in group if weight is not None)
