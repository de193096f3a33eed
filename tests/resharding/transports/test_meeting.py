"""Who is named where members of a group do not come. Groups themselves: tests/rollout/test_network_push.py."""

import time

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports.base import PeerError
from megatron_riskpo.resharding.transports.meeting import Meeting, call_off, is_link_error, join

TIMEOUT_S = 0.2
MEETING = Meeting("127.0.0.1", 0, "group/1", num_ranks=3, timeout_s=TIMEOUT_S)


def join_alone(store: dist.Store, meeting: Meeting) -> RunError:
    dist.PrefixStore(meeting.prefix, store).set("1", "")
    dist.PrefixStore(meeting.prefix, store).add("arrived", 1)
    with pytest.raises(RunError) as caught:
        join(store, meeting, 0, torch.device("cpu"))
    assert is_link_error(caught.value)
    assert isinstance(caught.value.__cause__, PeerError)
    assert caught.value.__cause__.peer == 2
    return caught.value


def test_who_does_not_come_is_named_when_time_is_up():
    start = time.monotonic()
    error = join_alone(dist.HashStore(), MEETING)
    assert TIMEOUT_S <= time.monotonic() - start < 5
    assert str(error) == f"rank 0 of 3 found no group: waiting for rank 2: of 1 none came in {TIMEOUT_S:g} s"


def test_a_meeting_that_is_called_off_is_over_at_once():
    store = dist.HashStore()
    meeting = Meeting("127.0.0.1", 0, "group/1", num_ranks=3, timeout_s=60.0)
    call_off(store, meeting, "the server answered 500")
    start = time.monotonic()
    assert "waiting for rank 2: the server answered 500" in str(join_alone(store, meeting))
    assert time.monotonic() - start < 5
