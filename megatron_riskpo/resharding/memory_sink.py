"""A vLLM rank's shard in plain tensors, where no engine is: for measuring the transfer alone, and its faults."""

import torch
from torch import Tensor

from megatron_riskpo.resharding.open_modules import OpenModules
from megatron_riskpo.resharding.pieces import module_of
from megatron_riskpo.resharding.placements import planned_placements
from megatron_riskpo.resharding.schedule import BridgeLayout


class MemorySink:
    """ShardSink whose parameters are as large as vLLM's, a padded vocabulary's missing rows apart."""

    def __init__(self, layout: BridgeLayout, tp_rank: int, like: Tensor) -> None:
        """`like` has the dtype and device."""
        sizes: dict[str, torch.Size] = {}
        for places in planned_placements(layout, tp_rank).values():
            for place in places:
                ends = torch.Size(stop for _, stop in place.target)
                before = sizes.get(place.parameter, ends)
                sizes[place.parameter] = torch.Size(max(pair) for pair in zip(before, ends, strict=True))
        self.parameters = {name: like.new_zeros(size) for name, size in sizes.items()}
        self.missing = {name: tensor.numel() for name, tensor in self.parameters.items()}
        self.open_modules = OpenModules()
        self._sizes: dict[str, int] = {}
        for name, tensor in self.parameters.items():
            self._sizes[module_of(name)] = self._sizes.get(module_of(name), 0) + tensor.numel()
        self._under_way: dict[str, int] = {}
        """The module that is, and how many of its numbers have not come."""

    def parameter(self, name: str) -> Tensor:
        """See ShardSink."""
        module = module_of(name)
        if module not in self._under_way:
            self.open_modules.begin(module, self._sizes[module] * self.parameters[name].itemsize)
            self._under_way[module] = self._sizes[module]
        return self.parameters[name]

    def arrived(self, name: str, numel: int) -> None:
        """See ShardSink."""
        module = module_of(name)
        self.missing[name] -= numel
        self._under_way[module] -= numel
        if not self._under_way[module]:
            del self._under_way[module]
            self.open_modules.end(module)
