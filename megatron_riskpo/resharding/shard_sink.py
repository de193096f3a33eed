"""A vLLM rank's own shard into vLLM in process, slice by slice, through its layerwise reload.

vLLM's own loaders take whole Hugging Face tensors and cut them, and keep what came until a module is complete. Here a
module gets its parameters in the layout of the checkpoint at the first slice (as the reload makes them, of this rank's
size), slices are copied in place, and at the last one vLLM packs the module and puts it back: no whole tensor, no
second copy of more than one module at a time. That the slices lie where vLLM's loaders would put them is checked
against these loaders before the first push (layout_check.py).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.open_modules import OpenModules
from megatron_riskpo.resharding.pieces import module_of


@dataclass
class _Module:
    """A module under way."""

    module: nn.Module
    missing: int
    """Numbers that have not come yet."""
    is_begun: bool = False
    is_packed: bool = False


class VllmShardSink:
    """ShardSink of one worker, for one push after the other."""

    def __init__(self, worker: Any, expected: Mapping[str, int]) -> None:
        """`expected`: how many numbers of each parameter a push brings (fewer than it has: a padded vocabulary)."""
        self._worker = worker
        self._expected = expected
        self._modules: dict[str, _Module] = {}
        self.open_modules = OpenModules()
        """Of the last push."""
        self.keep: Callable[[str, Tensor], None] | None = None
        """Called with each parameter when it is complete, before vLLM packs it (bridge.verify = "golden")."""
        self.pack_seconds = 0.0
        """vLLM's own work in the last push: packing modules, and putting them back."""

    @property
    def model(self) -> nn.Module:
        """vLLM's."""
        return self._worker.model_runner.get_model()

    def begin(self) -> None:
        """Bring the engine into the state in which it takes weights; it is unusable until `finish`."""
        self._worker.riskpo_begin_update()
        model, missing = self.model, {}
        for name, numel in self._expected.items():
            missing[module_of(name)] = missing.get(module_of(name), 0) + numel
        self.pack_seconds, self.open_modules = 0.0, OpenModules()
        self._modules = {name: _Module(model.get_submodule(name), numel) for name, numel in missing.items()}

    def parameter(self, name: str) -> Tensor:
        """Of this rank's size, in the checkpoint's layout."""
        path, _, attribute = name.rpartition(".")
        entry = self._modules[path]
        if not entry.is_begun:
            self._begin(path)
        return getattr(entry.module, attribute).data

    def _begin(self, path: str) -> None:
        entry = self._modules[path]
        tensors = [*entry.module.named_parameters(recurse=False), *entry.module.named_buffers(recurse=False)]
        missing = {name: tensor for name, tensor in tensors if tensor.is_meta}
        self.open_modules.begin(path, sum(tensor.nbytes for tensor in missing.values()))
        entry.is_begun = True
        if missing:
            _materialize(entry.module)
        for name in missing:
            tensor = getattr(entry.module, name)
            expected = self._expected.get(f"{path}.{name}", tensor.numel())
            if expected < tensor.numel():
                tensor.data[expected // tensor[0].numel() :].zero_()  # rows that pad the vocabulary

    def arrived(self, name: str, numel: int) -> None:
        """Count, and let vLLM pack a module that is complete."""
        path = module_of(name)
        entry = self._modules[path]
        entry.missing -= numel
        if entry.missing < 0:
            raise RunError(f"weight push: more numbers came for {path} than it has")
        if not entry.missing:
            self._complete(path)

    def _complete(self, path: str) -> None:
        for name in [name for name in self._expected if module_of(name) == path]:
            complete = self.parameter(name)
            if self.keep is not None:
                self.keep(name, complete)
        start = time.perf_counter()
        _pack(self._modules[path].module, self._worker.vllm_config)
        self.pack_seconds += time.perf_counter() - start
        self._modules[path].is_packed = True
        self.open_modules.end(path)

    def finish(self, version: int) -> None:
        """Put the engine back to work on the new weights; RunError if some are missing."""
        missing = [name for name, entry in self._modules.items() if entry.missing]
        if missing:
            raise RunError(
                f"weight push of version {version}: {len(missing)} of {len(self._modules)} modules are not complete, "
                f"the first is {missing[0]}"
            )
        # A rank may have nothing of a vocabulary but rows that pad it.
        for path in [path for path, entry in self._modules.items() if not entry.is_packed]:
            self._complete(path)
        self._modules = {}
        self._worker.riskpo_finish_update(version)


def _materialize(module: nn.Module) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_layer

    materialize_layer(module, get_layerwise_info(module))


def _pack(module: nn.Module, vllm_config: Any) -> None:
    """What the reload does when a module has all its weights: pack them, and copy them to where kernels look."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info

    with set_current_vllm_config(vllm_config):
        _layerwise_process(module, get_layerwise_info(module))
