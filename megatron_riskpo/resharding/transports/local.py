"""What a rank has itself: copied from Megatron's parameter into vLLM's, through no bucket."""

from torch import Tensor

from megatron_riskpo.resharding.slices import SourceSlice, TargetSlice


def copy_within_rank(source: SourceSlice, parameter: Tensor, target: TargetSlice, storage: Tensor) -> None:
    """One transfer whose source and destination are the same rank."""
    for into, part in source.copies(parameter, target.view(storage)):
        into.copy_(part)
