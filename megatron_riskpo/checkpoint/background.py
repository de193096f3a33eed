"""A write that goes on while training does."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable

from megatron_riskpo.errors import RunError

DONE, RUNNING, FAILED = range(3)


class BackgroundWrite:
    """One rank's write, in a thread that does not keep the process alive."""

    def __init__(self, work: Callable[[], object], what: str, timeout_s: float) -> None:
        self._what, self._timeout_s = what, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._complaint = ""
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def status(self) -> tuple[int, str]:
        """DONE, RUNNING or FAILED, and what to say of a failure."""
        is_running = self._thread.is_alive()
        if is_running and time.monotonic() >= self._deadline:
            return FAILED, self._too_slow()
        if is_running:
            return RUNNING, ""
        return (FAILED, self._complaint) if self._complaint else (DONE, "")

    def join(self) -> None:
        """Until it has ended, or its time is up."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))

    def leave_behind(self) -> None:
        """Let the process end without it, should it still be at work then: its rank has failed."""
        atexit.register(self._end_process)

    def _end_process(self) -> None:
        if not self._thread.is_alive():
            return
        # It waits in C++ for a disk or a peer. Woken while Python finalizes, it would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RunError.exit_code)

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except RunError as error:
            self._complaint = str(error)
        # Whatever it is, it has to reach the training loop: nobody else sees this thread end.
        except BaseException as error:
            is_late = time.monotonic() >= self._deadline
            self._complaint = self._too_slow() if is_late else self._unforeseen(error)

    def _unforeseen(self, error: BaseException) -> str:
        return (
            f"{self._what} could not be written: {type(error).__name__}: {' '.join(str(error).split())}; earlier "
            "checkpoints are intact; checkpoint.asynchronous = false with --debug shows where"
        )

    def _too_slow(self) -> str:
        return (
            f"{self._what} was not written within run.timeout_s = {self._timeout_s:g} s; earlier checkpoints are "
            "intact; raise run.timeout_s, or set run.dir to a faster disk"
        )
