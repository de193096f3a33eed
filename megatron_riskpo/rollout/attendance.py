"""Ranks that wait for servers, each for the responses that it has asked for, as long as those take.

They meet in a small collective again and again: none waits in one for longer than until the next, unless another rank
is dead or hangs. So a slow response, asked for as often as it takes, need not fit into run.timeout_s.
"""

import contextlib
from collections.abc import Collection, Iterator
from concurrent.futures import Future, as_completed

import torch.distributed as dist

_EVERY_S = 5.0


class Attendance:
    """Every rank of the group goes through `finished`, as often as it likes, and then through `until_all_are_done`."""

    def __init__(self, group: dist.ProcessGroup, every_s: float = _EVERY_S) -> None:
        """`every_s`: well below the time-out of the group's collectives."""
        self._group, self._every_s = group, every_s

    def finished(self, futures: Collection["Future[None]"]) -> Iterator["Future[None]"]:
        """Each as soon as it is done."""
        left = set(futures)
        while left:
            with contextlib.suppress(TimeoutError):
                for future in as_completed(left, self._every_s):
                    left.discard(future)
                    yield future
            if left:
                self._meet(is_done=False)

    def until_all_are_done(self) -> None:
        """Wait for the other ranks."""
        while not self._meet(is_done=True):
            pass

    def _meet(self, *, is_done: bool) -> bool:
        """Whether all ranks are done."""
        found = [False] * self._group.size()
        dist.all_gather_object(found, is_done, group=self._group)
        return all(found)
