"""What a trainer's process reports of one step."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepRecord:
    """One measured step."""

    seconds: float
    """Wall-clock time of the whole step."""
    phases: dict[str, float]
    """Seconds a phase."""
    prompt_tokens: int
    """Over all responses: a prompt counts once a response."""
    response_lengths: list[int]
    """In tokens, the end token included."""
    mean_reward: float


def write_records(records: Sequence[StepRecord], path: Path) -> None:
    path.write_text(json.dumps([asdict(record) for record in records]))


def read_records(path: Path) -> list[StepRecord]:
    return [StepRecord(**row) for row in json.loads(path.read_text())]
