"""A plan: whether a configuration can run on so many GPUs, with which memory and how fast."""

from dataclasses import dataclass
from typing import Any

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.planning.gpus import Gpu
from megatron_riskpo.planning.memory import RankMemory, complaints, plan_memory
from megatron_riskpo.planning.step_time import StepTime, plan_time
from megatron_riskpo.planning.workload import Workload, workload


@dataclass(frozen=True)
class Plan:
    """What was asked, and what comes of it."""

    config: TrainConfig
    world_size: int
    gpu: Gpu
    work: Workload
    memory: list[RankMemory]
    """Of the first rank of each pipeline stage, or of the ranks that were asked for."""
    time: StepTime
    complaints: list[str]
    """What does not fit; empty: it fits."""

    @property
    def peak(self) -> int:
        """Bytes of the rank that needs most."""
        return max(rank.peak for rank in self.memory)


def make_plan(
    config: TrainConfig, hf_config: dict[str, Any], world_size: int, gpu: Gpu, mean_response: float | None = None,
    ranks: list[int] | None = None,
) -> Plan:  # fmt: skip
    """Of a configuration that breaks no rule (config_checks)."""
    work = workload(config, Setup(config, world_size, hf_config).data_parallel, mean_response)
    memory = plan_memory(config, hf_config, world_size, gpu, work, ranks)
    time = plan_time(config, hf_config, world_size, gpu, work, memory[0])
    return Plan(config, world_size, gpu, work, memory, time, complaints(config, memory, gpu))
