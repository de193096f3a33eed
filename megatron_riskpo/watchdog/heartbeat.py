"""heartbeats/rank_N.json of a run folder: where each rank is, written over and over by its guard."""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "heartbeats"
_FILE_BYTES = 512
"""Every heartbeat fills as many: written in place, it is never seen empty, and costs no new file."""


@dataclass(frozen=True)
class Heartbeat:
    """One rank, as its guard saw it last."""

    rank: int
    local_rank: int
    host: str
    pid: int
    steps_done: int
    phase: str
    phases: int
    """Phases entered so far."""
    phase_s: float
    """Seconds since it entered the phase, less those in which its guard was stopped as well."""
    state: str
    """Of the process: R runs, S waits, D waits for a device, T is stopped (man 5 proc)."""
    beat: int
    """Counts the guard's beats: a heartbeat whose count stands still has no guard any more."""
    time: float
    """Unix time on its host."""

    @property
    def is_stopped(self) -> bool:
        return self.state in ("T", "t")

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank_{rank}.json"


def write_heartbeat(run_dir: Path, heartbeat: Heartbeat) -> None:
    """Raises OSError where the file system does not take it."""
    path = heartbeat_path(run_dir, heartbeat.rank)
    text = json.dumps(asdict(heartbeat)).ljust(_FILE_BYTES - 1) + "\n"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with path.open("r+") as file:
        file.write(text)


def read_heartbeat(run_dir: Path, rank: int, since: float = 0.0) -> Heartbeat | None:
    """None where there is none, it is just being written, or was before `since` (Unix time), by an earlier attempt."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        heartbeat = Heartbeat(**json.loads(heartbeat_path(run_dir, rank).read_text()))
        return heartbeat if heartbeat.time >= since else None
    return None
