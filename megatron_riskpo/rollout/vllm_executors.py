"""How a server of ours starts and asks vLLM's workers.

They end when their parent does, however it ends: vLLM's engine process does not notice that its API server was killed;
it would keep its memory for ever. And they fail together: a call that one of them fails is over in all of them.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from megatron_riskpo.distributed.launch import die_with_parent
from megatron_riskpo.resharding.transports.meeting import LOST_PEER

_UPDATE_CALLS = ("start_weight_update", "update_weights", "finish_weight_update")


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

    def collective_rpc(  # type: ignore[override]
        self, method: str | Callable, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None,
        non_block: bool = False, **choice: Any,
    ) -> Any:  # fmt: skip
        """As vLLM's, which raises at the first worker that fails and leaves the answers of the others to the next call.
        Here all answers are read first. A failed call of a weight update ends the update in all workers. Raises
        RuntimeError with a worker's own error, else with that of one that lost another worker."""
        if non_block or choice or not isinstance(method, str):
            return super().collective_rpc(method, timeout, args, kwargs, non_block, **choice)
        answers = super().collective_rpc(functools.partial(_attempt, method), timeout, args, kwargs)
        errors = [error for _, error in answers if error]
        if not errors:
            return [result for result, _ in answers]
        if method in _UPDATE_CALLS:
            super().collective_rpc(_end_update)
        own = [error for error in errors if LOST_PEER not in error]
        raise RuntimeError(f"Worker failed with error '{(own or errors)[0]}'")


def _attempt(method: str, worker: Any, *args: Any, **kwargs: Any) -> tuple[Any, str]:
    """In a worker: the result, or what went wrong, so that every worker answers."""
    try:
        return getattr(worker, method)(*args, **kwargs), ""
    except Exception as error:
        logging.getLogger("vllm").exception("the worker failed in %s", method)
        return None, str(error) or type(error).__name__


def _end_update(worker: Any) -> None:
    """In a worker: be ready for another /start_weight_update, as vLLM's worker is only where it failed itself."""
    worker = getattr(worker, "worker", worker)  # vLLM's wrapper passes on what is read, not what is set
    worker._weight_update_active = False
    if worker.weight_transfer_engine is not None:
        worker.weight_transfer_engine.reset_weight_update_target()
