"""Rounds over NCCL with its part played: what torch 2.13 does there as its sources say. Not tested here: a GPU."""

import os
import re
import time
from typing import Any

import pytest
import torch

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.memory_sink import MemorySink
from megatron_riskpo.resharding.network_receiver import _told
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.push import PushReport, WeightPush
from megatron_riskpo.resharding.transports.base import Parcel, PeerError
from megatron_riskpo.resharding.transports.meeting import LOST_PEER, watchdog_spares_the_process
from megatron_riskpo.resharding.transports.nccl import NcclTransport
from megatron_riskpo.rollout.push_ranks import problem_of
from tests.resharding.fault_ranks import fault_layout
from tests.resharding.whole_model import actor_parameters

BUFFER = torch.zeros(4)
SENDS, RECEIVES = [Parcel(3, BUFFER)], [Parcel(1, BUFFER), Parcel(2, BUFFER)]


class PlayedWork:
    """Of a batch: done after so many looks, or broken, which torch calls completed as well."""

    def __init__(self, looks: float = 0, error: str = "") -> None:
        self.looks, self.error, self.num_waits = looks, error, 0

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        self.num_waits += 1
        if self.error:
            raise torch.distributed.DistBackendError(self.error)


class PlayedGroup:
    """Its own backend as well. `fails`: the call that raises."""

    supports_coalescing = True

    def __init__(self, work: PlayedWork, fails: str = "") -> None:
        self.work, self.fails, self.calls = work, fails, []

    def _get_backend(self, device: torch.device) -> "PlayedGroup":
        return self

    def _called(self, name: str, *details: int) -> None:
        self.calls.append((name, *details))
        if name == self.fails:
            raise torch.distributed.DistBackendError(f"NCCL error in {name}: remote process exited")

    def _start_coalescing(self, device: torch.device) -> None:
        self._called("start")

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._called("send", peer)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._called("recv", peer)

    def _end_coalescing(self, device: torch.device) -> PlayedWork:
        self._called("end")
        return self.work


def start(group: PlayedGroup) -> Any:
    return NcclTransport(group).start(SENDS, RECEIVES)  # type: ignore[arg-type]


def test_a_round_is_one_batch_that_is_waited_for():
    group = PlayedGroup(PlayedWork(looks=5))
    pending = start(group)
    assert group.calls == [("start",), ("recv", 1), ("recv", 2), ("send", 3), ("end",)]
    assert group.work.num_waits == 0
    pending.receive(time.monotonic() + 60)
    assert group.work.looks < 0
    assert group.work.num_waits > 0
    assert NcclTransport(group).start([], []).drain(0) is None  # type: ignore[arg-type]
    assert len(group.calls) == 5


@pytest.mark.parametrize("call", ["receive", "drain"])
def test_a_batch_that_does_not_end_names_its_peers(call):
    pending = start(PlayedGroup(PlayedWork(looks=float("inf"))))
    begun = time.monotonic()
    with pytest.raises(PeerError, match=r"waiting for rank 1: no end in time \(others in the batch: \[2, 3\]\)"):
        getattr(pending, call)(begun + 0.05)
    assert 0.05 <= time.monotonic() - begun < 5


@pytest.mark.parametrize("call", ["receive", "drain"])
def test_a_batch_that_broke_is_a_lost_peer(call):
    pending = start(PlayedGroup(PlayedWork(error="NCCL communicator was aborted on rank 0. More of it")))
    with pytest.raises(PeerError, match=r"waiting for rank 1: NCCL communicator was aborted on rank 0$") as caught:
        getattr(pending, call)(time.monotonic() + 60)
    assert caught.value.peer == 1


@pytest.mark.parametrize(("fails", "peer"), [("start", 1), ("recv", 1), ("send", 3), ("end", 1)])
def test_a_batch_that_cannot_be_launched_is_a_lost_peer(fails, peer):
    with pytest.raises(PeerError, match=f"NCCL error in {fails}") as caught:
        start(PlayedGroup(PlayedWork(), fails))
    assert caught.value.peer == peer


def test_neither_side_takes_it_for_an_error_of_its_own():
    """A rank of the trainer tries again, and a server says that it is another one that was lost."""
    layout = fault_layout()
    parameters = actor_parameters(layout, rank=0)
    transport = NcclTransport(PlayedGroup(PlayedWork(error="remote process exited")))  # type: ignore[arg-type]
    push = WeightPush(plan_rank(layout, 0), parameters, transport, timeout_s=60)
    sink = MemorySink(layout, 0, next(iter(parameters.values())))

    def work() -> PushReport:
        return push.run(sink, version=7)

    problem = problem_of(work)
    assert problem is not None
    assert problem.is_link
    assert problem.peer in (1, 2)
    with pytest.raises(RunError, match=rf"^{re.escape(LOST_PEER)} .*version 7: rank 0, bucket of round \d+ did not"):
        _told(work)


def test_the_watchdog_of_a_group_with_servers_does_not_end_the_process(monkeypatch):
    for before in (None, "1"):
        monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
        if before is not None:
            monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", before)
        with watchdog_spares_the_process():
            assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
        assert os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == before
