"""vLLM's CPU workers with this project's corrections; imported by vLLM only (`worker_cls`)."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.v1.worker.cpu_worker import CPUWorker

_MEMORY = Path("/dev/shm")  # where Linux keeps shm_open's files


class CorrectedCpuWorker(CPUWorker):
    """vLLM 0.32's worker, whose experts are right under expert parallelism, too, and which leaves no shared memory
    behind where a process is killed."""

    def init_device(self) -> None:
        unlink_joined_memory()
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        heed_expert_map()
        super().load_model(*args, **kwargs)


class IsolatedCpuWorker(CorrectedCpuWorker):
    """Differs from vLLM 0.32's worker in two things more.

    Memory: vLLM binds all later allocations of the process to one NUMA node; the trainer lives here too.
    Shared memory: vLLM names that of a tensor-parallel group after the end of its init method, which for
    external_launcher is the same in every job: a second job that starts on the machine, or one that comes after a
    job killed while starting, fails with "create shm in SHMManager failed. errno: 17".
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        operators: Any = torch.ops._C
        bind_memory = operators.init_cpu_memory_env
        operators.init_cpu_memory_env = lambda nodes: None
        try:
            super().__init__(*args, **kwargs)
        finally:
            operators.init_cpu_memory_env = bind_memory

    def init_device(self) -> None:
        # Only a name here: the default process group is initialised already.
        options: Any = self.vllm_config.additional_config
        self.distributed_init_method += f":{options['shared_memory_name']}"
        super().init_device()


def unlink_joined_memory() -> None:
    """The files in shared memory of a tensor-parallel group, 4 MiB a rank, stay behind in vLLM 0.32 when a process
    ends by a signal or os._exit. From now on each rank takes its file's name away once all have mapped it."""
    join = _CPUSHMDistributed._init_cpu_shm
    if not hasattr(join, "__wrapped__"):
        _CPUSHMDistributed._init_cpu_shm = _without_name(join)  # type: ignore[method-assign]


def _without_name(join: Callable[[_CPUSHMDistributed], int]) -> Callable[[_CPUSHMDistributed], int]:
    @functools.wraps(join)
    def join_and_unlink(group: _CPUSHMDistributed) -> int:
        handle = join(group)  # ends with a barrier: every peer has mapped the file
        (_MEMORY / f"{group.group_name}_{group.communicator.rank}").unlink(missing_ok=True)
        return handle

    return join_and_unlink


def heed_expert_map() -> None:
    """vLLM 0.32's CPU kernel takes the numbers of experts as places among the rank's own, whatever `expert_map` says:
    under expert parallelism that is another expert, or memory behind the last one. From now on it is given places, and
    weight 0 for experts of other ranks, whose part the sum over the ranks brings."""
    apply = CPUUnquantizedExperts.apply
    if not hasattr(apply, "__wrapped__"):
        CPUUnquantizedExperts.apply = _with_own_experts(apply)  # type: ignore[method-assign]


def _with_own_experts(apply: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(apply)
    def apply_own(
        experts: CPUUnquantizedExperts, *, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None,
        apply_router_weight_on_input: bool, **rest: Any,
    ) -> None:  # fmt: skip
        if expert_map is not None:
            if apply_router_weight_on_input:
                raise NotImplementedError("expert parallelism on the CPU with router weights on the experts' input")
            places = expert_map[topk_ids.long()]
            topk_ids, topk_weights = places.clamp(min=0), topk_weights * (places >= 0)
        apply(
            experts, topk_ids=topk_ids, topk_weights=topk_weights, expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input, **rest,
        )  # fmt: skip

    return apply_own
