"""What each of two ranks does in test_attendance: one works far longer than meetings may take, by itself or for all.
Then served_rank_cases, in the same launch."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.rollout.attendance import Attendance
from megatron_riskpo.rollout.joint_work import JointWork
from tests.rollout import served_rank_cases

TIMEOUT_S, SLOW_S = 1.0, 2.0
PHASE = "the slow part"


def outcomes(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`work_outcomes`, and served_rank_cases."""
    return work_outcomes(), served_rank_cases.outcomes(folder)


def work_outcomes() -> dict[str, Any]:
    """Of each case, what this rank found, or its error."""
    control = Control.of_all(TIMEOUT_S)
    joint, impatient = JointWork(control, limit_s=60.0), JointWork(control, limit_s=0.4)
    return {
        "seconds": attend(control),
        "first": said(lambda: joint.of_first(lambda: found_late(7), PHASE)),
        "first fails": said(lambda: joint.of_first(fail, PHASE)),
        "all": said(lambda: joint.of_all(lambda: found_late(dist.get_rank()), PHASE)),
        "second fails": said(lambda: joint.of_all(fail if dist.get_rank() else lambda: 1, PHASE)),
        "afterwards": said(lambda: joint.of_first(dist.get_rank, PHASE)),
        # The last: the second rank has left, the first comes to meetings all the same.
        "hangs": said(lambda: impatient.of_first(lambda: found_late(7), PHASE)),
    }


def attend(control: Control) -> tuple[float, float]:
    """Seconds until this rank's responses were there, and until all were. Of its three responses the second rank's last
    is slow; it has none to begin with."""
    futures: list[Future[None]] = [Future() for _ in range(3)]
    for number, future in enumerate(futures):
        late = SLOW_S if number == 2 and dist.get_rank() == 1 else 0.1 * number
        threading.Timer(late, future.set_result, [None]).start()
    attendance, begun = Attendance(control), time.monotonic()
    assert not list(attendance.finished([], PHASE))
    assert set(attendance.finished(futures, PHASE)) == set(futures)
    own = time.monotonic() - begun
    attendance.until_all_are_done(PHASE)
    return own, time.monotonic() - begun


def found_late(value: int) -> int:
    """The first rank's, as long as it takes."""
    time.sleep(SLOW_S if dist.get_rank() == 0 else 0.0)
    return value


def fail() -> int:
    raise RunError(f"rank {dist.get_rank()} failed")


def said(work: Any) -> Any:
    try:
        return work()
    except RunError as error:
        return str(error)
