"""Where a rank's shard goes, and slices on their way there: copied, counted, and compared with where they came from."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.checksums import checksum
from megatron_riskpo.resharding.open_modules import OpenModules
from megatron_riskpo.resharding.peer_parameters import Parameters
from megatron_riskpo.resharding.rounds import Part


class ShardSink(Protocol):
    """Takes a rank's shard, slice by slice, into parameters as vLLM stores them before it packs them."""

    open_modules: OpenModules
    """What it has begun and not completed."""

    def parameter(self, name: str) -> Tensor:
        """The storage to copy slices into."""
        ...

    def arrived(self, name: str, numel: int) -> None:
        """So many numbers of a parameter have been copied in."""
        ...


def copy_slices(parts: Sequence[Part], parameters: Parameters, sink: ShardSink, source: int, checked: str) -> None:
    """From parameters within reach, those of rank `source`, into the sink. `checked`: what the push is called in the
    RunError where sums differ; empty: they are not compared."""
    for part in parts:
        storage = sink.parameter(part.target.parameter)
        part.source.copy(parameters[part.source.parameter], part.target.view(storage))
        if checked:
            compare([part], sums_of([part], parameters), sink, source, checked)
        sink.arrived(part.target.parameter, part.numel)


def sums_of(parts: Sequence[Part], parameters: Parameters) -> Tensor:
    """int64 [parts]: of what the parameters hold, not of a copy of it."""
    views = [part.source.views(parameters[part.source.parameter]) for part in parts]
    return torch.stack([checksum(*of_part) for of_part in views])


def compare(parts: Sequence[Part], sums: Tensor, sink: ShardSink, source: int, what: str) -> None:
    """What lies in the sink's parameters now with the source's sums; RunError where they differ."""
    found = [checksum(part.target.view(sink.parameter(part.target.parameter))) for part in parts]
    wrong = (torch.stack(found) != sums).nonzero()[:, 0].tolist()
    if wrong:
        name = parts[wrong[0]].target.parameter
        raise RunError(
            f"{what} is corrupted: of {len(parts)} slices from rank {source} {len(wrong)} have another checksum than "
            f"there, the first is of {name!r}"
        )
