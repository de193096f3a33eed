"""vLLM's CPU worker without its side effects on process and machine; imported by vLLM only (`worker_cls`)."""

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker


class IsolatedCpuWorker(CPUWorker):
    """Differs from vLLM 0.32's worker in two things.

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
