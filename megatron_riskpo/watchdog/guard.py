"""A process beside each rank that says where the rank is, and ends it when it stands still.

A process and not a thread: it goes on while the rank is stopped, or is in a call that holds Python's lock. Started by
`Watchdog`; imports no torch.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_riskpo.distributed.launch import report_error
from megatron_riskpo.distributed.signals import STOP_SIGNALS
from megatron_riskpo.watchdog import process
from megatron_riskpo.watchdog.heartbeat import Heartbeat, read_heartbeat, read_heartbeats, write_heartbeat
from megatron_riskpo.watchdog.laggards import Sighting, summary
from megatron_riskpo.watchdog.record import SharedPosition
from megatron_riskpo.watchdog.stall import StallFolder

POLL_S = 0.25
BEAT_S = 2.0
"""A small write to the shared file system a rank."""
ANSWER_S = 4.5
"""Two beats, and some: so long other guards have to answer a call, or count as silent."""
STOPPED_DUMP_S = 2.5
"""A stopped rank has to go on to write its stacks: after the others have written theirs."""
REPORT_S = 4.0
"""How much longer a guard waits for the report of the one that speaks for all."""
SUSPENDED_S = 5.0
"""A guard that was kept from running so much longer than it meant to sleep was stopped itself, as its rank was."""
CLOCK_SKEW_S = 60.0
"""Between nodes; heartbeats that are older than the rank by more are of an earlier attempt."""
REMEDY = "the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class GuardSettings:
    """What a rank tells its guard."""

    run_dir: str
    rank: int
    local_rank: int
    world_size: int
    pid: int
    """Of the rank, the guard's parent."""
    limit_s: float
    timeout_s: float
    position_fd: int
    stacks_fd: int


class Guard:
    """Of one rank."""

    def __init__(self, settings: GuardSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._run_dir = Path(settings.run_dir)
        self._shared = SharedPosition(settings.position_fd)
        self._start = time.time() - CLOCK_SKEW_S
        self._stall = StallFolder(self._run_dir, self._start)
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
                self._end(cause)
                return
            time.sleep(POLL_S)
        self._keep_last_words()

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
        # With each beat: the folder may lie on a file system that thousands of ranks share.
        return self._stall.called_for if self._last_beat == self._woken else ""

    def _beat_if_due(self) -> None:
        if self._clock() - self._last_beat >= BEAT_S:
            self._last_beat = self._woken
            self._beat(process.process_state(self._settings.pid))

    def _beat(self, state: str) -> Heartbeat:
        own, position = self._settings, self._position
        self._beats += 1
        heartbeat = Heartbeat(
            rank=own.rank, local_rank=own.local_rank, host=socket.gethostname(), pid=own.pid,
            steps_done=position.steps_done, phase=position.phase, phases=position.phases,
            phase_s=round(self._clock() - self._since, 1), state=state, beat=self._beats, time=round(time.time(), 3),
        )  # fmt: skip
        # A full or lost file system: the run has its own errors for that.
        with contextlib.suppress(OSError):
            write_heartbeat(self._run_dir, heartbeat)
        return heartbeat

    def _end(self, cause: str) -> None:
        """Stacks of all ranks, one report, and the end of this rank."""
        if not self._stall.called_for:
            self._stall.call(self._settings.rank, cause)
        heartbeat = self._beat(process.process_state(self._settings.pid))
        may_speak = self._settings.local_rank == 0
        before = self._heartbeats() if may_speak else []
        if not heartbeat.is_stopped:
            self._write_stacks(heartbeat)
        self._wait(STOPPED_DUMP_S if heartbeat.is_stopped else ANSWER_S, heartbeat)
        if heartbeat.is_stopped:
            self._write_stacks(heartbeat)
            self._wait(ANSWER_S - STOPPED_DUMP_S, heartbeat)
        if may_speak and self._is_first(before):
            self._report(cause, before)
        elif not self._wait_for_report(heartbeat):
            report_error(f"{cause}, and no other rank's guard answers; stacks: {self._stall.path}; {REMEDY}", 1,
                         expected=False)  # fmt: skip
        if self._rank_lives():
            process.kill(self._settings.pid)

    def _heartbeats(self) -> list[Heartbeat | None]:
        return read_heartbeats(self._run_dir, self._settings.world_size, self._start)

    def _write_stacks(self, heartbeat: Heartbeat) -> None:
        if not self._rank_lives():
            return
        stacks = process.dump_stacks(self._settings.pid, self._settings.stacks_fd)
        place = f"in {self._position} for {heartbeat.phase_s:.0f} s, process state {heartbeat.state}"
        self._stall.write_stacks(self._settings.rank, place, stacks)

    def _wait(self, seconds: float, heartbeat: Heartbeat, until: Callable[[], bool] = lambda: False) -> bool:
        """Go on beating, as the rank was found; whether `until` came true."""
        deadline = self._clock() + seconds
        while self._clock() < deadline:
            if until():
                return True
            self._beat(heartbeat.state)
            time.sleep(2 * POLL_S)
        return until()

    def _is_first(self, before: list[Heartbeat | None]) -> bool:
        """Whether no rank below this one has a guard that answers and may speak."""
        for rank, old in enumerate(before[: self._settings.rank]):
            if old is not None and old.local_rank == 0:
                new = read_heartbeat(self._run_dir, rank)
                if new is not None and new.beat != old.beat:
                    return False
        return True

    def _report(self, cause: str, before: list[Heartbeat | None]) -> None:
        pairs = enumerate(zip(before, self._heartbeats(), strict=True))
        ranks = [Sighting(rank, old, new, self._stall.stacks(rank)) for rank, (old, new) in pairs]
        line = summary(ranks, cause, str(self._stall.path), REMEDY)
        self._stall.write_report(line)
        report_error(line, 1, expected=True)

    def _wait_for_report(self, heartbeat: Heartbeat) -> bool:
        return self._wait(REPORT_S, heartbeat, lambda: bool(self._stall.report))

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
    Guard(GuardSettings(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
