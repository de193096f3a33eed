"""A process beside each rank that says where the rank is, and ends it when it stands still.

A process and not a thread: it goes on while the rank is stopped, or is in a call that holds Python's lock. Started by
`Watchdog`; imports no torch. Its clock runs on while the run folder hangs (`PatientThread`).
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_riskpo.distributed.launch import signal_when_parent_dies
from megatron_riskpo.distributed.patient_thread import PatientThread
from megatron_riskpo.distributed.signals import STOP_SIGNALS
from megatron_riskpo.watchdog import process
from megatron_riskpo.watchdog.ending import Ending
from megatron_riskpo.watchdog.heartbeat import Heartbeat, write_heartbeat
from megatron_riskpo.watchdog.record import SharedPosition
from megatron_riskpo.watchdog.settings import GuardSettings
from megatron_riskpo.watchdog.stall import StallFolder

POLL_S = 0.25
BEAT_S = 2.0
"""A small write to the shared file system a rank."""
PATIENCE_S = 5.0
"""With a run folder that does not answer, or 10 ms a rank in it if that is more."""
SUSPENDED_S = 5.0
"""A guard that was kept from running so much longer than it meant to sleep was stopped itself, as its rank was."""
CLOCK_SKEW_S = 60.0
"""Between nodes; heartbeats that are older than the rank by more are of an earlier attempt."""


class Guard:
    """Of one rank."""

    def __init__(self, settings: GuardSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._run_dir = Path(settings.run_dir)
        self._shared = SharedPosition(settings.position_fd)
        self._folder = PatientThread(max(PATIENCE_S, 0.01 * settings.world_size))
        self._start = time.time() - CLOCK_SKEW_S
        self._stall = StallFolder(self._run_dir, self._start)
        self._folder.begin(self._stall.look_back)
        self._call = ""
        """As the last beat found it."""
        self._position = self._shared.read()
        self._since = self._woken = clock()
        self._beats, self._last_beat = 0, float("-inf")

    def run(self) -> None:
        """Until the rank is gone, or has to be ended."""
        while self._rank_lives():
            self._look()
            self._beat_if_due()
            cause = self._cause()
            if cause:
                Ending(self._settings, self._stall, self._folder, self._beat, self._start).run(cause)
                return
            time.sleep(POLL_S)
        self._folder.do(self._keep_last_words, None)

    def _rank_lives(self) -> bool:
        return os.getppid() == self._settings.pid

    def _look(self) -> None:
        """Note where the rank is, and since when; time in which this process was stopped as well does not count."""
        now = self._clock()
        gap = now - self._woken - POLL_S
        if gap > SUSPENDED_S:
            self._since += gap
        self._woken = now
        position = self._shared.read()
        if position.phases != self._position.phases:
            self._since = now
        self._position = position

    def _cause(self) -> str:
        """Why the run has to end; empty: it has not."""
        own, stays = self._settings, self._clock() - self._since
        if self._position.timed_out:
            return f"a rank waited for the others longer than run.timeout_s = {own.timeout_s:g} s"
        if self._position.is_starting and stays > max(own.limit_s, own.timeout_s):
            return f"no progress within {max(own.limit_s, own.timeout_s):g} s (run.stall_limit_s, run.timeout_s)"
        if not self._position.is_starting and stays > own.limit_s:
            return f"no progress within run.stall_limit_s = {own.limit_s:g} s"
        return self._call

    def _beat_if_due(self) -> None:
        """And look for a call of others, not more often: thousands of ranks may share the folder's file system."""
        if self._clock() - self._last_beat >= BEAT_S and self._folder.is_idle:
            self._last_beat = self._woken
            self._beat(process.process_state(self._settings.pid))
            self._folder.begin(self._hear_call)

    def _hear_call(self) -> None:
        self._call = self._stall.called_for

    def _beat(self, state: str) -> Heartbeat:
        """Begin to write a heartbeat, unless the folder is busy with another."""
        own, position = self._settings, self._position
        self._beats += 1
        heartbeat = Heartbeat(
            rank=own.rank, local_rank=own.local_rank, host=socket.gethostname(), pid=own.pid,
            steps_done=position.steps_done, phase=position.phase, phases=position.phases,
            phase_s=round(self._clock() - self._since, 1), state=state, beat=self._beats, time=round(time.time(), 3),
        )  # fmt: skip
        if self._folder.is_idle:
            self._folder.begin(lambda: self._write(heartbeat))
        return heartbeat

    def _write(self, heartbeat: Heartbeat) -> None:
        # A full or lost file system: the run has its own errors for that.
        with contextlib.suppress(OSError):
            write_heartbeat(self._run_dir, heartbeat)

    def _keep_last_words(self) -> None:
        """Of a rank that ended without a word: what faulthandler wrote in a crash."""
        words = process.read_stacks(self._settings.stacks_fd)
        if words:
            self._stall.write_stacks(self._settings.rank, f"crashed in {self._position}", words)
            print(f"rank {self._settings.rank} crashed; stacks: {self._stall.path}", file=sys.stderr, flush=True)


def main() -> None:
    """`python -m megatron_riskpo.watchdog.guard SETTINGS`, a JSON object."""
    # They are sent to all processes of a job; the guard ends with its rank.
    for number in (*STOP_SIGNALS, signal.SIGHUP, process.DUMP_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    # One that was stopped with its rank ends as well.
    signal_when_parent_dies(signal.SIGCONT)
    Guard(GuardSettings(**json.loads(sys.argv[1]))).run()
    # Python itself would wait for a thread that writes into a full pipe, and abort. All output is flushed.
    os._exit(0)


if __name__ == "__main__":
    main()
