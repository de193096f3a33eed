"""How a guard ends its rank while the run folder is slow, and what it leaves for the job script. Without a rank: its
process id is nobody's."""

import os
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from megatron_riskpo.distributed.patient_thread import PatientThread
from megatron_riskpo.watchdog import ending as module
from megatron_riskpo.watchdog.ending import STALLED_FILE, Ending, mark_stalled
from megatron_riskpo.watchdog.guard import Guard
from megatron_riskpo.watchdog.heartbeat import Heartbeat, write_heartbeat
from megatron_riskpo.watchdog.record import Position, SharedPosition
from megatron_riskpo.watchdog.settings import GuardSettings

NOBODY = 2**22 + 1
"""Above the largest process id that Linux gives."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANSWER_S", "REPORT_S", "BESIDE_S"):
        monkeypatch.setattr(module, name, 0.5)
    monkeypatch.delenv("RANK", raising=False)


def ending(run_dir: Path, world_size: int = 2, patience_s: float = 10.0) -> Ending:
    """Of rank 0, by a guard that has not begun yet."""
    fd = os.memfd_create("position")
    SharedPosition(fd).write(Position(phase="update", phases=3))
    settings = GuardSettings(str(run_dir), 0, 0, world_size, NOBODY, 30.0, 600.0, fd, fd)
    guard = Guard(settings)
    guard._folder = PatientThread(patience_s)
    guard._folder.do(guard._stall.look_back, None)
    return Ending(settings, guard._stall, guard._folder, guard._beat, guard._start)


def beat(rank: int, number: int = 1) -> Heartbeat:
    return Heartbeat(rank, rank, "n0", NOBODY, 0, "update", 3, 1.0, "S", number, time.time())


def test_rank_0_reports_though_the_folder_was_slow(tmp_path: Path, monkeypatch, capfd) -> None:
    found = ending(tmp_path, patience_s=1.0)
    call_once, state = found._stall.call_once, module.process.process_state

    def slow(rank: int, cause: str) -> None:
        time.sleep(1.5)
        call_once(rank, cause)

    def later(pid: int) -> str:
        # When the folder answers again.
        while found._folder.hangs:
            time.sleep(0.05)
        return state(pid)

    monkeypatch.setattr(found._stall, "call_once", slow)
    monkeypatch.setattr(module.process, "process_state", later)
    write_heartbeat(tmp_path, beat(1))
    found.run("no progress")
    words = "no progress: rank 1 (n0) is in update after step 0 for 1 s, and silent since"
    assert words in found._stall.report
    assert words in capfd.readouterr().err


def test_a_guard_beats_while_it_reads_what_thousands_have_written(tmp_path: Path, monkeypatch) -> None:
    found, events = ending(tmp_path, world_size=1000), []
    monkeypatch.setattr(module, "read_heartbeat", lambda run_dir, rank, since: events.append("read") or rank)
    monkeypatch.setattr(found, "_beat", lambda state: events.append("beat"))
    assert found._look(beat(0)) == list(range(1000))
    assert events.count("read") == 1000
    assert max(len(list(some)) for event, some in groupby(events) if event == "read") <= 128


def test_an_error_of_the_output_keeps_no_rank_from_its_end(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    found, killed = ending(tmp_path), []
    monkeypatch.setattr(module, "report_error", fail)
    monkeypatch.setattr(found, "_kill", lambda: killed.append(found._stall.report))
    found.run("no progress")
    assert "no progress: rank 1 has not started" in killed[0]


def test_the_job_script_gets_the_report_whoever_comes_last(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "stalled"
    mark_stalled("rank 1 lags\n", "no progress")
    assert not file.exists()
    monkeypatch.setenv(STALLED_FILE, str(file))
    mark_stalled("", "no progress")
    assert file.read_text() == "no progress\n"
    mark_stalled("rank 1 lags\n", "no progress")
    mark_stalled("", "no progress")
    assert file.read_text() == "rank 1 lags\n"
    assert os.listdir(tmp_path) == ["stalled"]
    monkeypatch.setenv(STALLED_FILE, str(tmp_path / "none" / "stalled"))
    mark_stalled("rank 1 lags", "no progress")
