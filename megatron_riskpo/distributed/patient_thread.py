"""Calls that may never return (a file system that hangs, a peer that is gone), on a thread: the caller's clock runs on.

Imports no torch.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class PatientThread:
    """Makes one call after another, in order. The thread ends with the process, in whatever call it is then."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._last: Future[Any] = Future()
        self._last.set_result(None)
        self._late: Future[Any] | None = None
        """The call that was given up last."""
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def is_idle(self) -> bool:
        """Whether all that was asked for is done."""
        return self._last.done()

    @property
    def hangs(self) -> bool:
        """Whether a call that `do` has given up has not returned yet."""
        return self._late is not None and not self._late.done()

    def begin(self, work: Callable[[], T]) -> "Future[T]":
        """Have it called; nobody waits."""
        self._last = Future()
        self._work.put((work, self._last))
        return self._last

    def do(self, work: Callable[[], T], otherwise: T) -> T:
        """What `work` returns; `otherwise` where that takes longer than `patience_s`, or an earlier call hangs."""
        if self.hangs:
            return otherwise
        call = self.begin(work)
        try:
            return call.result(self._patience_s)
        except TimeoutError:
            if call.done():
                # The call's own, or it came just now.
                return call.result()
            self._late = call
            return otherwise

    def _run(self) -> None:
        while True:
            _settle(*self._work.get())


def in_time(work: Callable[[], T], patience_s: float) -> T:
    """What one call returns, or raises; TimeoutError where that takes longer than `patience_s`: then it goes on, for as
    long as the process lives."""
    call: Future[T] = Future()
    threading.Thread(target=_settle, args=(work, call), daemon=True).start()
    return call.result(patience_s)


def _settle(work: Callable[[], T], call: "Future[T]") -> None:
    try:
        call.set_result(work())
    except Exception as error:
        call.set_exception(error)
