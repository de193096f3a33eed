"""The rank grid: which process groups this rank is in. Built once, passed as an argument."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_riskpo.config import ActorConfig


@dataclass(frozen=True)
class RankGrid:
    """Megatron's order of ranks: tensor parallel fastest, then context, data, pipeline parallel."""

    world: ProcessGroup
    """All ranks."""
    tp: ProcessGroup
    """Ranks that split each layer."""
    pp: ProcessGroup
    """Ranks that hold consecutive layers, first stage first."""
    cp: ProcessGroup
    """Ranks that split each sequence."""
    dp: ProcessGroup
    """Ranks that hold the same weights and the same part of their sequences, and see different sequences."""
    dp_cp: ProcessGroup
    """Ranks that hold the same weights: data and context parallel together."""
    ep: ProcessGroup
    """Ranks that hold different experts."""
    etp: ProcessGroup
    """Ranks that split each expert."""

    @property
    def rank(self) -> int:
        return self.world.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the input embedding (with virtual stages, in its first chunk)."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the output layer (with virtual stages, in its last chunk)."""
        return self.pp.rank() == self.pp.size() - 1

    def split_group(self, *, of_expert: bool) -> ProcessGroup:
        """The ranks that hold the parts of a split weight, an expert's or another."""
        return self.etp if of_expert else self.tp

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors for collectives live."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def build_grid(actor: ActorConfig, seed: int, timeout_s: float = 600.0) -> RankGrid:
    """Build Megatron's groups over the initialised default group, and seed its tensor-parallel RNG.

    `timeout_s`, in seconds, bounds every collective of these groups.

    The data-parallel size is world_size / (tp * cp * pp); config_checks refuses sizes that do not divide.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=actor.tp,
        pipeline_model_parallel_size=actor.pp,
        virtual_pipeline_model_parallel_size=actor.vp if actor.vp > 1 else None,
        context_parallel_size=actor.cp,
        expert_model_parallel_size=actor.ep,
        expert_tensor_parallel_size=actor.etp,
        distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return RankGrid(
        world=dist.group.WORLD,  # type: ignore[arg-type]
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
    )
