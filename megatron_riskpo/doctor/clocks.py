"""Clocks of a job's nodes against rank 0's."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from megatron_riskpo.doctor.line import Line
from megatron_riskpo.doctor.meeting import GRACE_S
from megatron_riskpo.errors import RunError
from megatron_riskpo.watchdog.guard import CLOCK_SKEW_S

WARN_S = 1.0
"""Logs of several nodes no longer tell what came first."""


def clock_offsets(
    rank: int, leaders: Mapping[str, int], timeout_s: float, enter: Callable[[str], None], store: Any
) -> dict[str, tuple[float, float]]:
    """Host -> seconds that its clock is ahead of rank 0's, and how far that may be off; on rank 0, empty elsewhere.
    `leaders`: the rank of each host that answers. Each host is asked in turn, and answers with its time. Made for
    `watched`, which ends those that still wait to be asked when rank 0 raises RunError: a host did not answer in half
    of the time."""
    enter("messages to and fro")
    limit = timedelta(seconds=timeout_s / 2)
    offsets = {}
    if rank == 0:
        for host, leader in leaders.items():
            if leader == 0:
                continue
            asked = time.time()
            store.set(f"clock/ask/{leader}", "")
            try:
                store.wait([f"clock/answer/{leader}"], limit)
            except RuntimeError as error:
                raise RunError(f"{host} (rank {leader}) does not answer within {timeout_s / 2:g} s") from error
            answered = time.time()
            theirs = float(store.get(f"clock/answer/{leader}"))
            offsets[host] = (theirs - (asked + answered) / 2, (answered - asked) / 2)
    elif rank in leaders.values():
        store.wait([f"clock/ask/{rank}"], timedelta(seconds=2 * timeout_s + GRACE_S))
        store.set(f"clock/answer/{rank}", repr(time.time()))
    return offsets


def clock_line(offsets: Mapping[str, tuple[float, float]]) -> Line:
    """`offsets`: of clock_offsets."""
    if not offsets:
        return Line("clocks", "ok", "one node")
    host = max(offsets, key=lambda host: abs(offsets[host][0]))
    offset, error = offsets[host]
    found = f"{host} is {abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} rank 0's node (+- {error:.3f} s)"
    remedy = f"set the clock of {host} (chronyc tracking, timedatectl)"
    if abs(offset) - error > CLOCK_SKEW_S:
        return Line("clocks", "fail", f"{found}; the watchdog takes at most {CLOCK_SKEW_S:g} s", remedy)
    if abs(offset) - error > WARN_S:
        return Line("clocks", "warn", found, remedy)
    return Line("clocks", "ok", f"at most: {found}")
