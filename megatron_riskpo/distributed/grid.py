"""The rank grid: which process groups this rank is in. Built once, passed as an argument."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RankGrid:
    """Megatron's order of ranks: tensor parallel fastest, then data, then pipeline."""

    world: ProcessGroup
    """All ranks."""
    tp: ProcessGroup
    """Ranks that split each layer."""
    pp: ProcessGroup
    """Ranks that hold consecutive layers, first stage first."""
    dp: ProcessGroup
    """Ranks that hold the same weights and see different sequences."""

    @property
    def rank(self) -> int:
        return self.world.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors for collectives live."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def build_grid(tp_size: int, pp_size: int, seed: int) -> RankGrid:
    """Build Megatron's groups over the initialised default group, and seed its tensor-parallel RNG.

    The data-parallel size is world_size / (tp_size * pp_size); config_checks refuses sizes that do not divide.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return RankGrid(
        world=dist.group.WORLD,  # type: ignore[arg-type]
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
    )
