"""Golden mode: what has reached vLLM, compared bit for bit with whole tensors gathered by the exporter of checkpoints.

Nothing is shared with the plan: the tensors come by the exporter's all-gathers, and vLLM's own loaders say which part
of them belongs where. On the CPU vLLM packs linear layers, so that they cannot be read back: compared is what lay in
the parameter just before. What vLLM does not pack is read back from the live model as well.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.checksums import bits_of
from megatron_riskpo.resharding.layout_check import Box, Placement


class GoldenCopy:
    """Of one push on one rank."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self.differences: list[str] = []
        self.num_compared = 0
        """Numbers."""

    def keep(self, name: str, parameter: Tensor) -> None:
        """A complete parameter, in the checkpoint's layout."""
        self._kept[name] = parameter.clone()

    def compare(
        self, weights: Iterable[tuple[str, Tensor]], placements: Mapping[str, Sequence[Placement]], model: nn.Module
    ) -> None:
        """Exhausts `weights`; notes the differing tensors, and how many numbers were compared."""
        live = {name: parameter.data for name, parameter in model.named_parameters()}
        for name, whole in weights:
            for place in placements[name]:
                expected = whole[_index(place.source)]
                parameters = [self._kept[place.parameter]]
                if (
                    place.parameter in live
                    and live[place.parameter].shape == parameters[0].shape
                    and _is_readable(model, place.parameter)
                ):
                    parameters.append(live[place.parameter])
                for parameter in parameters:
                    if not _same_bits(parameter[_index(place.target)].reshape(expected.shape), expected):
                        self.differences.append(name)
                self.num_compared += expected.numel()

    def refuse(self, version: int, differences: Sequence[int]) -> None:
        """RunError where any rank has found some; `differences` is how many each rank has."""
        if any(differences):
            rank = max(range(len(differences)), key=differences.__getitem__)
            own = f", on this one {self.differences[0]}" if self.differences else ""
            raise RunError(
                f"bridge.verify: after sync {version} vLLM holds other numbers than the actor; rank {rank} found "
                f"{differences[rank]} tensors{own}"
            )


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """NaN equals itself, 0 and -0 differ."""
    return first.dtype == second.dtype and torch.equal(bits_of(first.contiguous()), bits_of(second.contiguous()))


def _is_readable(model: nn.Module, parameter: str) -> bool:
    """vLLM packs experts in a tensor of the same shape; everything else that it packs it empties."""
    return ".routed_experts." not in parameter or next(model.parameters()).is_cuda
