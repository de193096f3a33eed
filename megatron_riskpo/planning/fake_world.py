"""One rank of a job of any size, on one CPU: process groups without peers, and tensors without memory.

What is built inside is the real thing, Megatron's modules, gradient buffers and optimizers under the project's own
actor; only storage and messages are missing.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from megatron_riskpo.config import ActorConfig
from megatron_riskpo.distributed import cpu_backend
from megatron_riskpo.distributed.grid import RankGrid, build_grid


@contextlib.contextmanager
def fake_rank(rank: int, world_size: int, actor: ActorConfig) -> Iterator[RankGrid]:
    """The rank grid of `rank` in a job of world_size ranks, for the length of the body; no other process exists.

    Collectives do nothing. RuntimeError where a default process group is there already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu_backend.install()
    if dist.is_initialized():
        raise RuntimeError("a rank can only be faked in a process that has no process group")
    with _one_process_for_all():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield build_grid(actor, seed=0)
        finally:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


@contextlib.contextmanager
def _one_process_for_all() -> Iterator[None]:
    """All groups are fake, also those that Megatron wants on gloo; of objects every rank is taken to have the same."""
    new_group = dist.new_group

    def fake_group(*args: Any, **options: Any) -> Any:
        return new_group(*args, **{**options, "backend": "fake"})

    def gather_own(gathered: list[Any], own: Any, group: Any = None) -> None:
        gathered[:] = [own] * len(gathered)

    with mock.patch.object(dist, "new_group", fake_group), mock.patch.object(dist, "all_gather_object", gather_own):
        yield


class MemorylessMode(FakeTensorMode):
    """Tensors made inside have sizes and no memory.

    Whole numbers that were real before stay so: what is worked out of them alone (where sequences start and end) can
    be looked at.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # of thousands of views few are alike: to look for one takes longer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # A list of equal counts, such as the tokens of each expert.
        counts = func is torch.ops.aten.full.default and kwargs.get("dtype") is torch.long
        if counts or (tensors and not any(isinstance(t, FakeTensor) or t.is_floating_point() for t in tensors)):
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made in the body have no memory; nothing is compiled, and weights get no first values."""
    from megatron_riskpo.actor import model_config

    blank = functools.partial(model_config.TransformerConfig, perform_initialization=False)
    with (
        mock.patch.object(model_config, "TransformerConfig", blank),
        mock.patch.object(nn.Module, "_apply", _convert_in_place),
        torch.compiler.set_stance("force_eager"),
        MemorylessMode(),
    ):
        yield


def _convert_in_place(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    """nn.Module._apply for fake parameters, which torch's own wants to swap and cannot: Megatron keeps weak references
    to them."""
    for part in module.modules() if recurse else (module,):
        for parameter in [parameter for parameter in part._parameters.values() if parameter is not None]:
            with torch.no_grad():
                converted = convert(parameter)
            if converted is not parameter:
                parameter.data = converted
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = convert(buffer)
    return module
