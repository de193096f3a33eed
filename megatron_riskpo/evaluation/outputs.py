"""nemo-skills' output files: output.jsonl (one greedy sample) or output-rs{seed}.jsonl, one file a sample, one line a
question, all files in the same order. A line has the question's own fields and those of OUTPUT_FIELDS."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import UsageError

RESULTS_FOLDER = "eval-results"
GREEDY_FILE = "output.jsonl"
SEED_FILE = re.compile(r"output-rs(\d+)\.jsonl")
OUTPUT_FIELDS = (
    "generation", "num_generated_tokens", "finish_reason", "generation_start_time", "generation_end_time",
    "generation_time", "predicted_answer", "symbolic_correct",
)  # fmt: skip
"""What a sample adds to the question's fields, as nemo-skills names it."""
GRADING_ERROR = "grading_error"
"""True in a line whose response could not be graded: our own field, beside symbolic_correct = false."""

Line = dict[str, Any]


def output_file(seed: int, greedy: bool) -> str:
    """The name of the file of one sample."""
    return GREEDY_FILE if greedy else f"output-rs{seed}.jsonl"


def output_files(folder: Path) -> list[Path]:
    """The output files of one benchmark, in the order in which nemo-skills takes the samples: by name.

    Raises UsageError: none, or a greedy file beside sampled ones.
    """
    sampled = sorted(path for path in folder.glob("output-rs*.jsonl") if SEED_FILE.fullmatch(path.name))
    greedy = [folder / GREEDY_FILE] if (folder / GREEDY_FILE).is_file() else []
    if greedy and sampled:
        raise UsageError(
            f"{folder} holds {GREEDY_FILE} and {len(sampled)} output-rs files, of two evaluations; move one away"
        )
    if not greedy and not sampled:
        raise UsageError(
            f"{folder} has no {GREEDY_FILE} and no output-rs*.jsonl; name a folder with evaluation outputs"
        )
    return greedy or sampled


def evaluation_of(folder: Path) -> Path:
    """The folder of the evaluation that is meant: of a run its evaluation/, of DIR/eval-results DIR."""
    if folder.resolve().name == RESULTS_FOLDER:
        return folder.resolve().parent
    of_run = folder / "evaluation"  # a benchmark may have this name, too
    return of_run if (of_run / RESULTS_FOLDER).is_dir() else folder


def benchmark_folders(results: Path) -> dict[str, Path]:
    """{benchmark: its folder} of DIR/eval-results/BENCH/, of DIR/BENCH/, or of DIR itself, whichever there is.

    Raises UsageError where there is none.
    """
    if not results.is_dir():
        raise UsageError(f"{results}: no such folder; name one with evaluation outputs (DIR/{RESULTS_FOLDER}/BENCH/)")
    if any(results.glob("output*.jsonl")):
        return {results.resolve().name: results}
    root = results / RESULTS_FOLDER if (results / RESULTS_FOLDER).is_dir() else results
    found = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and any(path.glob("output*.jsonl"))}
    if not found:
        raise UsageError(
            f"{results} has no evaluation outputs: neither output*.jsonl nor {RESULTS_FOLDER}/BENCH/output*.jsonl; "
            "riskpo evaluate makes them"
        )
    return found


def read_lines(path: Path) -> list[Line]:
    """All lines of a finished file. Raises UsageError that names the line that is no JSON object."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def read_partial(path: Path) -> list[Line]:
    """The whole lines of a file that is still being written, or was when the process was killed; a half-written last
    line is cut off, in the file as well. An absent file has none."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    return read_lines(path)


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines; they are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # backslashreplace: a lone surrogate out of a byte-level tokenizer becomes a JSON escape and not an error.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _parsed(line: str, place: str) -> Line:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is no JSON ({error}): {line[:60]!r}; restore the file") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{place} is no JSON object but {line[:60]!r}; restore the file")
    return fields
