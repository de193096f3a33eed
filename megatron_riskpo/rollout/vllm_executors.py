"""How a server of ours starts vLLM's workers: they end when their parent does, however it ends.

vLLM's engine process does not notice that its API server was killed; it would keep its memory for ever.
"""

import os

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from megatron_riskpo.distributed.launch import die_with_parent


class InEngineExecutor(UniProcExecutor):
    """One worker, in the engine's process. vLLM itself takes a process of its own on the CPU, to set OpenMP's threads;
    ours are set before the server starts, and two processes that spin for each other starve on few cores."""

    def _init_executor(self) -> None:
        die_with_parent(os.getppid())
        super()._init_executor()


class WorkersExecutor(MultiprocExecutor):
    """A process a worker (tensor parallelism); vLLM's workers do end with the engine."""

    def _init_executor(self) -> None:
        die_with_parent(os.getppid())
        super()._init_executor()
