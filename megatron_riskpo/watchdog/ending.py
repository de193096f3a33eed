"""The end of a rank in a run that stands still: its stacks, one report of all ranks, and SIGKILL."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_riskpo.distributed.launch import report_error
from megatron_riskpo.distributed.patient_thread import PatientThread
from megatron_riskpo.watchdog import process
from megatron_riskpo.watchdog.heartbeat import Heartbeat, read_heartbeat
from megatron_riskpo.watchdog.laggards import Sighting, summary, whereabouts
from megatron_riskpo.watchdog.settings import GuardSettings
from megatron_riskpo.watchdog.stall import StallFolder

ANSWER_S = 4.5
"""Two beats, and some: so long other guards have to answer a call, or count as silent. Stacks are written meanwhile."""
STOPPED_DUMP_S = 2.5
"""A stopped rank has to go on to write its stacks: after the others have written theirs."""
REPORT_S = 4.0
READ_S = 0.01
"""How much longer a guard waits for the report of the one that speaks for all, and for each rank, of which that one
reads three small files."""
BESIDE_S = 2.0
"""After the report, the ranks beside this one have so long to be ended by their own guards."""
OUTPUT_S = 2.0
"""The rank's output has to take the report."""
_PAUSE_S = 0.5
_CHUNK = 128
"""Files that are read between two beats."""
REMEDY = "the same command goes on from the last checkpoint"
STALLED_FILE = "RISKPO_STALLED_FILE"
"""Environment variable: a file to write then, by which a job script tells a stall from a failure."""


T = TypeVar("T")


def longest_s(world_size: int) -> float:
    """From the call to the end of the rank, where the folder and the output take what is written."""
    return ANSWER_S + REPORT_S + READ_S * world_size + BESIDE_S


class Ending:
    """Of one rank, by its guard. `beat` writes a heartbeat with the process state that it is given; `start`: Unix time
    before which heartbeats are of an earlier attempt."""

    def __init__(
        self, settings: GuardSettings, stall: StallFolder, folder: PatientThread, beat: Callable[[str], Heartbeat],
        start: float,
    ) -> None:  # fmt: skip
        self._settings, self._stall, self._folder, self._beat, self._start = settings, stall, folder, beat, start
        self._run_dir = Path(settings.run_dir)
        self._output = PatientThread(OUTPUT_S)
        self._stacks = ""

    def run(self, cause: str) -> None:
        """Takes `longest_s` at most, and the patience with the folder and with the output once where they hang."""
        try:
            self._explain(cause)
        finally:
            self._kill()

    def _explain(self, cause: str) -> None:
        begun = time.monotonic()
        self._folder.do(lambda: self._stall.call_once(self._settings.rank, cause), None)
        heartbeat = self._beat(process.process_state(self._settings.pid))
        before = self._look(heartbeat)
        if heartbeat.is_stopped:
            self._wait(begun + STOPPED_DUMP_S, heartbeat)
        self._write_stacks(heartbeat)
        self._wait(begun + ANSWER_S, heartbeat)
        if not before:
            # The folder may have been slow, and be well again.
            before = self._look(heartbeat)
            self._wait(time.monotonic() + ANSWER_S * bool(before), heartbeat)
        self._tell(cause, heartbeat, before)
        self._folder.do(lambda: mark_stalled(self._stall.report, cause), None)

    def _look(self, heartbeat: Heartbeat) -> list[Heartbeat | None]:
        """At all ranks, where this one may speak for them; nothing where it may not, or the folder hangs."""
        if self._settings.local_rank != 0:
            return []
        return self._of_all_ranks(lambda rank: read_heartbeat(self._run_dir, rank, self._start), heartbeat)

    def _of_all_ranks(self, read: Callable[[int], T], heartbeat: Heartbeat) -> list[T]:
        """Beats in between: of thousands of ranks it takes longer than others wait for an answer."""
        found: list[T] = []
        for first in range(0, self._settings.world_size, _CHUNK):
            ranks = range(first, min(first + _CHUNK, self._settings.world_size))
            some: list[T] = self._folder.do(lambda ranks=ranks: [read(rank) for rank in ranks], [])
            if not some:
                return []
            found += some
            self._beat(heartbeat.state)
        return found

    def _write_stacks(self, heartbeat: Heartbeat) -> None:
        if os.getppid() != self._settings.pid:
            return
        self._stacks = process.dump_stacks(self._settings.pid, self._settings.stacks_fd)
        place = f"in {heartbeat.phase} after step {heartbeat.steps_done} for {heartbeat.phase_s:.0f} s"
        place += f", process state {heartbeat.state}"
        self._folder.do(lambda: self._stall.write_stacks(self._settings.rank, place, self._stacks), None)

    def _wait(self, deadline: float, heartbeat: Heartbeat, until: Callable[[], bool] = lambda: False) -> bool:
        """Go on beating, as the rank was found, while the folder answers; whether `until` came true."""
        while time.monotonic() < deadline and not self._folder.hangs:
            if self._folder.do(until, False):
                return True
            self._beat(heartbeat.state)
            time.sleep(max(0.0, min(_PAUSE_S, deadline - time.monotonic())))
        return self._folder.do(until, False)

    def _tell(self, cause: str, heartbeat: Heartbeat, before: list[Heartbeat | None]) -> None:
        """One line for all ranks, or where this one is alone, its own."""
        if before and self._folder.do(lambda: not self._stall.report and self._is_first(before), False):
            if self._report(cause, heartbeat, before):
                return
        else:
            deadline = time.monotonic() + REPORT_S + READ_S * self._settings.world_size
            self._wait(deadline, heartbeat, lambda: bool(self._stall.report))
        if self._folder.hangs:
            found = (
                f"{whereabouts(heartbeat)}; the run folder {self._run_dir} does not answer (a file system that hangs?)"
            )
            self._tell_alone(f"{cause}: {found}, so nothing is known of other ranks; stacks: in this rank's output")
            self._say(lambda: print(self._stacks, file=sys.stderr, flush=True))
        elif not self._folder.do(lambda: self._stall.report, ""):
            self._tell_alone(f"{cause}, and no other rank's guard answers; stacks: {self._stall.path}")

    def _tell_alone(self, line: str) -> None:
        self._say(lambda: report_error(f"{line}; {REMEDY}", 1, expected=False))

    def _say(self, words: Callable[[], None]) -> None:
        """A pipe that is full, or a disk that hangs, keeps no rank from its end; nor does one that nobody reads."""
        with contextlib.suppress(OSError):
            self._output.do(words, None)

    def _is_first(self, before: list[Heartbeat | None]) -> bool:
        """Whether no rank below this one has a guard that answers and may speak."""
        for rank, old in enumerate(before[: self._settings.rank]):
            if old is not None and old.local_rank == 0:
                new = read_heartbeat(self._run_dir, rank)
                if new is not None and new.beat != old.beat:
                    return False
        return True

    def _report(self, cause: str, heartbeat: Heartbeat, before: list[Heartbeat | None]) -> bool:
        """Whether the folder had what is needed for it."""
        after = self._look(heartbeat)
        stacks = self._of_all_ranks(self._stall.stacks, heartbeat)
        if not (after and stacks):
            return False
        ranks = [Sighting(rank, *seen) for rank, seen in enumerate(zip(before, after, stacks, strict=True))]
        line = summary(ranks, cause, str(self._stall.path), REMEDY)
        self._folder.do(lambda: self._stall.write_report(line), None)
        self._say(lambda: report_error(line, 1, expected=True))
        return True

    def _kill(self) -> None:
        """This rank, and in a while those beside it whose guards do not: torchrun would leave a stopped one 30 s."""
        import psutil

        beside = process.ranks_beside(self._settings.pid)
        if os.getppid() == self._settings.pid:
            process.kill(self._settings.pid)
        for left in psutil.wait_procs(beside, timeout=BESIDE_S)[1]:
            with contextlib.suppress(psutil.Error):
                left.kill()


def mark_stalled(report: str, cause: str) -> None:
    """Tell the job script, if any: the report; where there is none the cause, unless another guard has said more."""
    path = os.environ.get(STALLED_FILE)
    if not path:
        return
    with contextlib.suppress(OSError):
        if report:
            draft = Path(f"{path}.{socket.gethostname()}.{os.getpid()}")
            draft.write_text(f"{report.rstrip()}\n")
            draft.replace(path)
        else:
            with open(path, "x") as file:
                file.write(f"{cause}\n")
