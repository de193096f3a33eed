"""What a rank keeps from step to step: parameters, gradients and the optimizer's state, counted to the byte."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.planning.fake_world import fake_rank, without_memory

if TYPE_CHECKING:
    from megatron_riskpo.actor.actor import Actor


@dataclass(frozen=True)
class StateBytes:
    """Of one rank, in bytes."""

    num_parameters: int
    """Parameters that the rank holds, padding of the vocabulary included."""
    parameters: int
    """With the distributed optimizer, padding of Megatron's buffers included."""
    gradients: int
    """Megatron's float32 buffers, padding included."""
    main_weights: int
    """Float32 copies of bfloat16 weights (this rank's shard of them); 0 for a float32 model."""
    moments: int
    """AdamW's two, float32, and its step counts; they appear in the first optimizer step."""

    @property
    def optimizer(self) -> int:
        """Main weights and moments."""
        return self.main_weights + self.moments

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def rank_state(
    hf_config: dict[str, Any], actor: ActorConfig, dtype: torch.dtype, rank: int, world_size: int
) -> StateBytes:
    """Of rank `rank`: its actor is built as `riskpo train` builds it, without memory and without the other ranks."""
    with fake_rank(rank, world_size, actor) as grid, without_memory():
        from megatron_riskpo.actor.actor import Actor

        # Where the state lies is another question than how large it is.
        on_device = dataclasses.replace(actor, offload_optimizer=False)
        return state_bytes(Actor(hf_config, on_device, OptimizerConfig(), dtype, grid))


def state_bytes(actor: "Actor") -> StateBytes:
    """Of an actor that is there, before its first optimizer step; gives it its moments."""
    from megatron_riskpo.actor.optimizer import allocate_state
    from megatron_riskpo.actor.optimizer_offload import state_tensors

    parameters = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    main_weights = storage_bytes(state_tensors(actor.optimizer))
    allocate_state(actor.optimizer)
    return StateBytes(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        parameters=storage_bytes(parameters),
        gradients=storage_bytes(parameter.main_grad for parameter in parameters),  # type: ignore[attr-defined]
        main_weights=main_weights,
        moments=storage_bytes(state_tensors(actor.optimizer)) - main_weights,
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory under the tensors, counted once where they share it."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def stage_ranks(actor: ActorConfig, world_size: int) -> list[int]:
    """The first rank of each pipeline stage, which holds as much as any other of the stage."""
    return list(range(0, world_size, world_size // actor.pp))
