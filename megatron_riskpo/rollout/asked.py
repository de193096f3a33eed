"""Responses that servers are asked for in the event loop's thread, seen from the thread that waits for them."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.attendance import Attendance
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.server_pool import NoServersError, Response, ServerPool
from megatron_riskpo.rollout.types import SamplingConfig

RESPONSES = "the responses of the rollout servers"
"""A phase, as errors call it."""
Asked = dict["Future[None]", int]
"""The row of each response that was asked for."""


def ask(
    loop: LoopThread, pool: ServerPool, responses: Sequence[Response], rows: Iterable[int], sampling: SamplingConfig
) -> Asked:
    """Have the pool bring responses[row] to its end, of each of `rows`; returns at once."""
    return {loop.submit(pool.complete(responses[row], sampling)): row for row in rows}


def outcomes(asked: Asked, attendance: Attendance) -> Iterator[tuple[int, RunError | NoServersError | None]]:
    """Each row as soon as its response is finished, or will not be: then with the reason."""
    for future in attendance.finished(asked, RESPONSES):
        try:
            future.result()
            yield asked[future], None
        except (RunError, NoServersError) as error:
            yield asked[future], error
