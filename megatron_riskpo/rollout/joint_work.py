"""Work of one rank that the others wait for, or of each by itself, whose outcome all have to know.

It may take long, and a rank that is stopped meanwhile has to be noticed soon. So a thread goes to the ranks' meetings
(attendance.py) while the calling thread works: it stops with its process. A rank that is alive and hangs is bounded by
`limit_s`. The rank that works hears of a lost one when its work, which has bounds of its own, is done.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from megatron_riskpo.distributed.patient_thread import PatientThread
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.rollout.attendance import Attendance

Result = TypeVar("Result")


class JointWork:
    """Made once; the calling thread may use the control's group between the calls."""

    def __init__(self, control: Control, limit_s: float) -> None:
        """A rank that does not answer is noticed in the control's time; `limit_s`: run.timeout_s."""
        self._control, self._limit_s = control, limit_s
        self._attendance = Attendance(control)
        self._thread: PatientThread | None = None

    def of_first(self, work: Callable[[], Result], phase: str) -> Result:
        """What the first rank finds, or its RunError, on every rank. Collective."""
        if self._control.group.rank() == 0:
            found = self._attempt(work, phase)
        else:
            self._attendance.until_all_are_done(phase, self._limit_s)
            found = None
        return self._shared(found, phase)[0]

    def of_all(self, work: Callable[[], Result], phase: str) -> list[Result]:
        """What each rank finds, or the first one's RunError, on every rank. Collective."""
        return self._shared(self._attempt(work, phase), phase)

    def _attempt(self, work: Callable[[], Result], phase: str) -> tuple[Result | None, str]:
        with self._attending(phase):
            try:
                return work(), ""
            except RunError as error:
                return None, str(error)

    def _shared(self, found: tuple[Result | None, str] | None, phase: str) -> list[Result]:
        outcomes = [outcome for outcome in self._control.gather_objects(found, phase) if outcome is not None]
        if errors := [error for _, error in outcomes if error]:
            raise RunError(errors[0])
        return [result for result, _ in outcomes]

    @contextmanager
    def _attending(self, phase: str) -> Iterator[None]:
        done: Future[None] = Future()
        self._thread = self._thread or PatientThread(self._limit_s)
        meetings = self._thread.begin(lambda: self._attend(done, phase))
        try:
            yield
        finally:
            done.set_result(None)
        meetings.result()

    def _attend(self, done: "Future[None]", phase: str) -> None:
        for _ in self._attendance.finished([done], phase):
            pass
        self._attendance.until_all_are_done(phase, self._limit_s)
