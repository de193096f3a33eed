"""Ranks as threads that meet in a store, each over a connection of its own. With real ranks and torch's TCPStore:
test_job."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from megatron_riskpo.distributed.launch import RankEnv
from megatron_riskpo.doctor import watched as module
from megatron_riskpo.doctor.clocks import clock_offsets
from megatron_riskpo.doctor.meeting import Meeting, SharedError
from megatron_riskpo.doctor.watched import watched
from megatron_riskpo.errors import RunError

HOSTS = ["n0", "n1", "n2"]
LEADERS = {"n0": 0, "n1": 1, "n2": 2}
LATE_S = 5.0
"""A rank comes so late: longer than the store may be silent, within the time that it has."""
OVER = threading.Event()
"""What communication waits for that hangs."""
Enter = Callable[[str], None]


def one_is_late(rank: int, enter: Enter, store: Any) -> int:
    enter("start")
    if rank == 0:
        time.sleep(LATE_S)
        store.set("late", "")
    store.wait(["late"])
    return rank


def rank_0_is_too_late(rank: int, enter: Enter, store: Any, late: int = 0) -> None:
    if rank != late:
        enter("start")
    OVER.wait()


def rank_2_is_too_late(rank: int, enter: Enter, store: Any) -> None:
    rank_0_is_too_late(rank, enter, store, late=2)


def rank_1_fails(rank: int, enter: Enter, store: Any) -> None:
    enter("pairs")
    if rank == 1:
        time.sleep(0.5)
        raise RuntimeError("CUDA error\nsee above")
    if rank == 2:
        OVER.wait()


def rank_1_hangs(rank: int, enter: Enter, store: Any) -> None:
    enter("pairs")
    if rank == 1:
        OVER.wait()


def a_clock_hangs(rank: int, enter: Enter, store: Any) -> Any:
    if rank == 1:
        enter("messages to and fro")
        OVER.wait()
    return clock_offsets(rank, {"n0": 0, "n1": 1}, 2.0, enter, store)


def clocks(rank: int, enter: Enter, store: Any) -> Any:
    return clock_offsets(rank, LEADERS, 50.0, enter, store)


TIMEOUTS_S = {
    one_is_late: 50.0,
    rank_0_is_too_late: 1.0,
    rank_2_is_too_late: 1.0,
    rank_1_fails: 50.0,
    rank_1_hangs: 1.0,
    a_clock_hangs: 2.0,
    clocks: 50.0,
}
"""Of the meeting, by what the ranks do. All run side by side: each mostly waits."""


@pytest.fixture(scope="module")
def outcomes() -> dict[Any, list[Any]]:
    """What `watched` returns, or the error that it raises, on every rank."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(TIMEOUTS_S)) as pool:
        for name, value in (("_TELL_S", 0.1), ("_SILENT_S", 1.5), ("_STORE_S", 4.0)):
            patch.setattr(module, name, value)
        found = dict(zip(TIMEOUTS_S, pool.map(all_ranks, TIMEOUTS_S, TIMEOUTS_S.values()), strict=True))
        OVER.set()
    return found


class Connection:
    """To a store: it makes one call at a time, as those of torch's TCPStore. In memory, since a TCPStore asks the
    resolver for the name of every address that it connects to, which may take seconds."""

    def __init__(self, store: Any) -> None:
        self._store, self._call = store, threading.Lock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with self._call:
                return getattr(self._store, name)(*arguments)

        return call

    def clone(self) -> "Connection":
        return Connection(self._store)


def all_ranks(work: Callable[[int, Enter, Any], Any], timeout_s: float) -> list[Any]:
    shared = dist.HashStore()

    def one(rank: int) -> Any:
        meeting = Meeting(Connection(shared), RankEnv(rank, len(HOSTS), 0), timeout_s, HOSTS)
        try:
            return watched(meeting, "test", lambda enter, store: work(rank, enter, store))
        except RunError as error:
            return error
        finally:
            meeting.part()

    with ThreadPoolExecutor(len(HOSTS)) as pool:
        return list(pool.map(one, range(len(HOSTS))))


def test_a_rank_that_comes_late_but_in_time_is_waited_for(outcomes) -> None:
    assert outcomes[one_is_late] == [[0, 1, 2]] * 3


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (rank_0_is_too_late, "rank 0 (n0) does not get through the start within 1 s, others do"),
        (rank_2_is_too_late, "rank 2 (n2) does not get through the start within 1 s, others do"),
        (rank_1_fails, "rank 1 (n1) does not get through pairs: CUDA error see above"),
        (rank_1_hangs, "rank 1 (n1) does not get through pairs within 1 s, others do"),
        (
            a_clock_hangs,
            "rank 0 (n0) does not get through messages to and fro: n1 (rank 1) does not answer within 1 s",
        ),
    ],
)
def test_who_keeps_the_others_waiting_is_named_on_all_ranks(work, words: str, outcomes) -> None:
    """Whether rank 0 waits as well, or is done."""
    assert all(isinstance(error, SharedError) for error in outcomes[work]), outcomes[work]
    assert {str(error).partition("; see ")[0] for error in outcomes[work]} == {f"test: {words}"}


def test_clocks_of_one_machine_agree(outcomes) -> None:
    offsets = outcomes[clocks][0][0]
    assert offsets.keys() == {"n1", "n2"}
    for offset, error in offsets.values():
        assert abs(offset) <= error + 1e-3
