"""Sample responses of a run: rollouts/step_N.jsonl, one object a response."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = "rollouts"
FIELDS = ("problem", "expected_answer", "response", "reward", "finished", "advantage")
SHAPED = "shaped_reward"
"""The reward that the advantage was made of; a row may have it, and it is written where it is not the graded one."""


def write_samples(run_dir: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows (each has all of FIELDS) with the step before them; a file of the same step is replaced."""
    path = run_dir / FOLDER / f"step_{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    # backslashreplace: a lone surrogate out of a byte-level tokenizer becomes a JSON escape and not an error.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            values = {"step": step, **{name: to_json(row[name]) for name in FIELDS}}
            if SHAPED in row and row[SHAPED] != row["reward"]:
                values[SHAPED] = to_json(row[SHAPED])
            file.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def to_json(value: Any) -> Any:
    """nan and inf have no JSON number: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sample_steps(run_dir: Path) -> list[int]:
    """Steps that have samples, ascending."""
    names = (re.fullmatch(r"step_(\d+)\.jsonl", path.name) for path in (run_dir / FOLDER).glob("step_*.jsonl"))
    return sorted(int(found[1]) for found in names if found)


def drop_samples_after(run_dir: Path, step: int) -> None:
    """Delete what an earlier process sampled after the step that this one goes on from."""
    for later in sample_steps(run_dir):
        if later > step:
            (run_dir / FOLDER / f"step_{later}.jsonl").unlink()


def read_samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The rows of one step."""
    # No splitlines: it also cuts at U+2028 and the like, which a response may contain.
    lines = (run_dir / FOLDER / f"step_{step}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
