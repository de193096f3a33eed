"""The end of a rank in a run that stands still: its stacks, one report of all ranks, and SIGKILL."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_riskpo.distributed.launch import report_error
from megatron_riskpo.distributed.patient_thread import PatientThread
from megatron_riskpo.watchdog import process
from megatron_riskpo.watchdog.heartbeat import Heartbeat, read_heartbeat, read_heartbeats
from megatron_riskpo.watchdog.laggards import Sighting, summary, whereabouts
from megatron_riskpo.watchdog.settings import GuardSettings
from megatron_riskpo.watchdog.stall import StallFolder

ANSWER_S = 4.5
"""Two beats, and some: so long other guards have to answer a call, or count as silent. Stacks are written meanwhile."""
STOPPED_DUMP_S = 2.5
"""A stopped rank has to go on to write its stacks: after the others have written theirs."""
REPORT_S = 4.0
"""How much longer a guard waits for the report of the one that speaks for all."""
BESIDE_S = 2.0
"""After the report, the ranks beside this one have so long to be ended by their own guards."""
_PAUSE_S = 0.5
REMEDY = "the same command goes on from the last checkpoint"
STALLED_FILE = "RISKPO_STALLED_FILE"
"""Environment variable: a file to write then, by which a job script tells a stall from a failure."""


class Ending:
    """Of one rank, by its guard. `beat` writes a heartbeat with the process state that it is given; `start`: Unix time
    before which heartbeats are of an earlier attempt."""

    def __init__(
        self, settings: GuardSettings, stall: StallFolder, folder: PatientThread, beat: Callable[[str], Heartbeat],
        start: float,
    ) -> None:  # fmt: skip
        self._settings, self._stall, self._folder, self._beat, self._start = settings, stall, folder, beat, start
        self._run_dir = Path(settings.run_dir)
        self._stacks = ""

    def run(self, cause: str) -> None:
        """Takes ANSWER_S, REPORT_S and BESIDE_S at most, and the folder's patience once where that hangs."""
        begun = time.monotonic()
        self._folder.do(lambda: self._stall.call_once(self._settings.rank, cause), None)
        heartbeat = self._beat(process.process_state(self._settings.pid))
        before = self._folder.do(self._heartbeats, []) if self._settings.local_rank == 0 else []
        if heartbeat.is_stopped:
            self._wait(begun + STOPPED_DUMP_S, heartbeat)
        self._write_stacks(heartbeat)
        self._wait(begun + ANSWER_S, heartbeat)
        self._tell(cause, heartbeat, before)
        self._folder.do(lambda: mark_stalled(self._stall.report or cause), None)
        self._kill()

    def _heartbeats(self) -> list[Heartbeat | None]:
        return read_heartbeats(self._run_dir, self._settings.world_size, self._start)

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
        if before and self._folder.do(lambda: self._is_first(before), False):
            self._folder.do(lambda: self._report(cause, before), None)
        else:
            self._wait(time.monotonic() + REPORT_S, heartbeat, lambda: bool(self._stall.report))
        if self._folder.hangs:
            print(self._stacks, file=sys.stderr, flush=True)
            found = (
                f"{whereabouts(heartbeat)}; the run folder {self._run_dir} does not answer (a file system that hangs?)"
            )
            self._tell_alone(f"{cause}: {found}, so nothing is known of other ranks; stacks: above")
        elif not self._folder.do(lambda: self._stall.report, ""):
            self._tell_alone(f"{cause}, and no other rank's guard answers; stacks: {self._stall.path}")

    def _tell_alone(self, line: str) -> None:
        report_error(f"{line}; {REMEDY}", 1, expected=False)

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

    def _kill(self) -> None:
        """This rank, and in a while those beside it whose guards do not: torchrun would leave a stopped one 30 s."""
        import psutil

        beside = process.ranks_beside(self._settings.pid)
        if os.getppid() == self._settings.pid:
            process.kill(self._settings.pid)
        for left in psutil.wait_procs(beside, timeout=BESIDE_S)[1]:
            with contextlib.suppress(psutil.Error):
                left.kill()


def mark_stalled(text: str) -> None:
    """Tell the job script, if any."""
    path = os.environ.get(STALLED_FILE)
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{text.rstrip()}\n")
