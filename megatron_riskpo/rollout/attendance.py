"""Ranks that are done with their work at different times, and wait for each other as long as that takes.

They meet in a small exchange again and again: none waits in one for longer than until the next, unless another rank
is dead, stopped or hangs. So work that may take long (responses of a server, asked for as often as it takes) need not
fit into the time-out of an exchange.
"""

import contextlib
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future, as_completed

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control

_EVERY_S = 5.0
_MEETINGS = 4
"""At least, in the time-out of one."""


class Attendance:
    """Every rank goes through `finished`, as often as it likes, and then through `until_all_are_done`. Both raise
    RunError, which names `phase`, where a rank does not come to a meeting in the control's time."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._every_s = min(_EVERY_S, control.timeout_s / _MEETINGS)

    def finished(self, futures: Collection["Future[None]"], phase: str) -> Iterator["Future[None]"]:
        """Each as soon as it is done."""
        left = set(futures)
        while left:
            with contextlib.suppress(TimeoutError):
                for future in as_completed(left, self._every_s):
                    left.discard(future)
                    yield future
            if left:
                self._meet(phase, is_done=False)

    def until_all_are_done(self, phase: str, limit_s: float | None = None) -> None:
        """Wait for the other ranks. RunError after `limit_s` for ranks that come, and are not done."""
        start = time.monotonic()
        while busy := self._meet(phase, is_done=True):
            if limit_s is not None and time.monotonic() - start > limit_s:
                raise RunError(f"{phase}: ranks {busy} are not done after {limit_s:g} s (run.timeout_s)")

    def _meet(self, phase: str, *, is_done: bool) -> list[int]:
        """The ranks that are not done."""
        found = self._control.gather(is_done, phase)
        return [rank for rank, is_done in enumerate(found) if not is_done]
