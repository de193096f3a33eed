"""What a rank does when rank 0 does not answer. With real ranks: test_job."""

import threading
from typing import Any

import pytest

from megatron_riskpo.distributed.launch import RankEnv
from megatron_riskpo.doctor import meeting as module
from megatron_riskpo.doctor.meeting import Meeting
from megatron_riskpo.errors import RunError


class StoppedStore:
    """Takes what is sent, and answers nothing, as torch's store does when rank 0 has got SIGSTOP."""

    def set(self, key: str, value: str) -> None:
        pass

    def wait(self, *_: Any) -> None:
        threading.Event().wait()

    add = wait


def test_a_rank_0_that_is_stopped_is_waited_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    monkeypatch.setattr(module, "_PART_S", 0.1)
    meeting = Meeting(StoppedStore(), RankEnv(1, 2, 0), timeout_s=0.2)
    with pytest.raises(RunError, match="versions: rank 0 does not answer any more: stopped, or lost with its node"):
        meeting.collect("versions", "")
    meeting.part()
