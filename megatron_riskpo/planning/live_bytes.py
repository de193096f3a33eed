"""How many bytes the tensors of a computation hold while it runs."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes(known) as live: ...` counts the memory that operations in the body allocate, and its peak.

    Memory of the `known` tensors does not count. Works with tensors that have no memory (without_memory) as well.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.current = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at a time."""
        self._alive: dict[int, weakref.ref] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._take_in(leaf)
        return out

    def _take_in(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(reference: Any) -> None:
            self.current -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.current += size
        self.peak = max(self.peak, self.current)
