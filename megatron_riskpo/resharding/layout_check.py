"""Where vLLM's own weight loaders put a Hugging Face tensor, found by letting them load tensors without content.

Inside a layerwise reload all parameters are on the meta device. The loaders are given whole meta tensors; what they
copy from where to where is noted, nothing is moved. So the plan's idea of vLLM's storage is held against vLLM itself,
for this very model and layout, before the first push.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_riskpo.errors import RunError

Box = tuple[tuple[int, int], ...]
"""[start, stop) a dimension."""


@dataclass(frozen=True)
class Placement:
    """One copy that a loader makes."""

    source: Box
    """Of the Hugging Face tensor."""
    parameter: str
    target: Box
    """Of vLLM's parameter."""


class _NoteCopies(TorchDispatchMode):
    """Notes the views that are copied between."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].numel():
            self.copies.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def box_of(view: Tensor, whole: torch.Size) -> Box:
    """Where a view lies in the contiguous tensor of that shape that it was cut from; vectors and matrices, or a slice
    of a stack of matrices."""
    sizes = [1] * (len(whole) - view.ndim) + list(view.shape)
    offset, starts = view.storage_offset(), []
    for dim in range(len(whole)):
        step = whole[dim + 1 :].numel()
        starts.append(offset // step)
        offset %= step
    return tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))


def traced_placements(model: nn.Module, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, list[Placement]]:
    """By Hugging Face name, what vLLM's loaders copy on this rank; `tensors` are names and shapes. Call it between
    `initialize_layerwise_reload` and the first weight."""
    found: dict[str, list[Placement]] = {}
    with _noting(model) as (mode, names):
        for name, shape in tensors:
            mode.copies.clear()
            names.clear()
            model.load_weights(iter([(name, torch.empty(shape, device="meta"))]))  # type: ignore[operator]
            found[name] = [
                Placement(box_of(source, torch.Size(shape)), parameter, box_of(target, whole))
                for (target, source), (parameter, whole) in zip(mode.copies, names, strict=True)
            ]
    return found


@contextmanager
def _noting(model: nn.Module) -> Iterator[tuple[_NoteCopies, list[tuple[str, torch.Size]]]]:
    """Every parameter's loader replaced by its original under the notebook; `names` gets the parameter of each copy."""
    mode, names = _NoteCopies(), []
    wrapped = {name: parameter for name, parameter in model.named_parameters() if hasattr(parameter, "weight_loader")}
    loaders: dict[str, Callable] = {name: parameter.weight_loader for name, parameter in wrapped.items()}  # type: ignore[attr-defined]
    for name, parameter in wrapped.items():
        parameter.weight_loader = _noted(name, _original(loaders[name]), mode, names)  # type: ignore[attr-defined]
    try:
        yield mode, names
    finally:
        for name, parameter in wrapped.items():
            parameter.weight_loader = loaders[name]  # type: ignore[attr-defined]


def _noted(name: str, loader: Callable, mode: _NoteCopies, names: list[tuple[str, torch.Size]]) -> Callable:
    def load(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(loader).bind(*args, **kwargs)
        first = next(iter(bound.arguments))  # some modules name it, some do not
        parameter = bound.arguments[first]
        # Biases stay real during a reload: a stand-in keeps their numbers.
        bound.arguments[first] = parameter if parameter.is_meta else _meta_like(parameter)
        before = len(mode.copies)
        with mode:
            result = loader(*bound.args, **bound.kwargs)
        names.extend([(name, parameter.shape)] * (len(mode.copies) - before))
        return result

    return load


def _meta_like(parameter: Tensor) -> Tensor:
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    return to_meta_tensor(parameter)


def _original(loader: Callable) -> Callable:
    while loader.__name__ == "online_process_loader":
        loader = loader.__wrapped__  # type: ignore[attr-defined]
    return loader


def compare(planned: dict[str, list[Placement]], traced: dict[str, list[Placement]]) -> None:
    """RunError names the first tensor that vLLM would put elsewhere."""
    for name in planned.keys() | traced.keys():
        ours, theirs = planned.get(name, []), traced.get(name, [])
        if sorted(ours, key=str) != sorted(theirs, key=str):
            raise RunError(
                f"the bridge would put {name} at {ours}, vLLM's own loader at {theirs}: this vLLM stores the model "
                "otherwise than the family's table says (resharding/pieces.py)"
            )
