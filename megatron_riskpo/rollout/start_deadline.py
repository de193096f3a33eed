"""The time that a server has to become healthy, kept also while its main thread waits inside vLLM or in a C call."""

import faulthandler
import signal
from types import TracebackType
from typing import Any

from megatron_riskpo.errors import RunError

_STDERR = 2
GRACE_S = 30.0
"""For the end of what has been started; whatever hangs then is left by the process."""


class Interrupted(SystemExit):
    """Raised by a signal. Not KeyboardInterrupt, which vLLM ignores where it waits for its engine, and waits on; but
    one of the two, since nothing else that a signal raises ends uvloop."""


def interrupt(*signal_and_frame: Any) -> None:
    """A handler for signals that end a server's start."""
    raise Interrupted


class StartDeadline:
    """Until `met`, the body has so many seconds: then it is interrupted, and RunError takes the place of whatever it
    raises or returns. For the main thread.

    `grace_s` later the process ends, if it is still there, with all threads' stacks on stderr and exit code 1.
    """

    def __init__(self, seconds: float, grace_s: float = GRACE_S) -> None:
        self._seconds, self._grace_s = seconds, grace_s
        self._is_over = False

    def __enter__(self) -> "StartDeadline":
        signal.signal(signal.SIGALRM, self._expire)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        # A thread of C: it needs neither Python's lock nor a signal that is let through.
        faulthandler.dump_traceback_later(self._seconds + self._grace_s, exit=True, file=_STDERR)
        return self

    def met(self) -> None:
        """The server is healthy: no end from here on."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()

    def _expire(self, *signal_and_frame: Any) -> None:
        self._is_over = True
        interrupt()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_over:
            raise RunError(
                f"the server was not healthy within server.start_timeout_s = {self._seconds:g} s; see the lines above, "
                "or give it more"
            ) from error
        self.met()
