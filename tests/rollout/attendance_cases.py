"""What each of two ranks does in test_attendance: the second waits far longer than collectives may take. Then
served_rank_cases, in the same launch."""

import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_riskpo.rollout.attendance import Attendance
from tests.rollout import served_rank_cases

TIMEOUT_S, EVERY_S, SLOW_S = 2.0, 0.2, 5.0


def outcomes(folder: Path) -> tuple[tuple[float, float], list[dict[str, Any]]]:
    """`_waits`, and served_rank_cases."""
    return _waits(), served_rank_cases.outcomes(folder)


def _waits() -> tuple[float, float]:
    """Seconds until this rank's responses were there, and until all were. Of its three responses the second rank's last
    is slow."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))
    assert group is not None
    futures: list[Future[None]] = [Future() for _ in range(3)]
    for number, future in enumerate(futures):
        late = SLOW_S if number == 2 and dist.get_rank() == 1 else 0.1 * number
        threading.Timer(late, future.set_result, [None]).start()
    attendance, begun = Attendance(group, EVERY_S), time.monotonic()  # type: ignore[arg-type]
    assert set(attendance.finished(futures)) == set(futures)
    own = time.monotonic() - begun
    attendance.until_all_are_done()
    return own, time.monotonic() - begun
