"""What a call does that fails in one of two workers. vLLM's classes are real; queues and the engine that takes the
weights are played."""

from collections import deque
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import WorkerWrapperBase

from megatron_riskpo.resharding.transports.meeting import LOST_PEER
from megatron_riskpo.rollout.vllm_executors import WorkersExecutor


class Answers(SimpleQueue):
    """A worker's."""

    def enqueue(self, answer: Any) -> None:
        self.put(answer)

    def dequeue(self, timeout: float | None = None) -> Any:
        return self.get(timeout=5)


class WeightEngine:
    """Fails in the named calls."""

    def __init__(self, errors: dict[str, str]) -> None:
        self.errors = errors

    def call(self, name: str) -> None:
        if name in self.errors:
            raise RuntimeError(self.errors.pop(name))

    def start_weight_update(self) -> None:
        self.call("start")

    def update_weights(self, info: dict[str, Any]) -> None:
        self.call("update")

    def finish_weight_update(self) -> None:
        self.call("finish")

    def reset_weight_update_target(self) -> None:
        """There is one."""


def worker_process(rank: int, config: VllmConfig, errors: dict[str, str]) -> WorkerProc:
    worker: Any = object.__new__(Worker)
    worker.vllm_config, worker._weight_update_active = config, False
    worker.weight_transfer_engine = WeightEngine(errors)
    worker.model_runner = SimpleNamespace(reset_lora_state=lambda: None)
    wrapper: Any = object.__new__(WorkerWrapperBase)
    process: Any = object.__new__(WorkerProc)
    wrapper.worker = worker
    process.worker, process.rank, process.use_async_scheduling = wrapper, rank, False
    process.worker_response_mq = Answers()
    return process


def executor_of(kind: type, errors: list[dict[str, str]]) -> MultiprocExecutor:
    """With a worker for each; `errors` by call."""
    config = VllmConfig()
    executor: Any = object.__new__(kind)
    processes = [worker_process(rank, config, of) for rank, of in enumerate(errors)]

    def ask(request: Any) -> None:
        for process in processes:
            process._execute_worker_rpc(request)

    executor.is_failed, executor.futures_queue = False, deque()
    executor.rpc_broadcast_mq = SimpleNamespace(enqueue=ask)
    executor.response_mqs = [process.worker_response_mq for process in processes]
    return executor


def answers_of(executor: Any) -> list[Answers]:
    return executor.response_mqs


def update(executor: MultiprocExecutor) -> None:
    executor.collective_rpc("start_weight_update")
    executor.collective_rpc("update_weights", kwargs={"update_info": {}})
    assert executor.collective_rpc("finish_weight_update") == [None, None]


@pytest.mark.parametrize("call", ["start", "update", "finish"])
@pytest.mark.parametrize("rank", [0, 1])
def test_after_a_failed_call_another_update_goes_through(call, rank):
    errors: list[dict[str, str]] = [{}, {}]
    errors[rank][call] = "no memory"
    executor = executor_of(WorkersExecutor, errors)
    with pytest.raises(RuntimeError, match="Worker failed with error 'no memory'"):
        update(executor)
    assert all(queue.empty() for queue in answers_of(executor))
    update(executor)


def test_an_error_of_a_workers_own_comes_before_the_loss_of_another():
    executor = executor_of(WorkersExecutor, [{"update": f"{LOST_PEER} rank 3"}, {"update": "no memory"}])
    with pytest.raises(RuntimeError, match="no memory"):
        update(executor)


def test_vllm_itself_still_leaves_answers_behind():
    """Else our own way of calling can go."""
    executor = executor_of(MultiprocExecutor, [{"start": "no memory"}, {}])
    with pytest.raises(RuntimeError, match="no memory"):
        executor.collective_rpc("start_weight_update")
    assert not answers_of(executor)[1].empty()
