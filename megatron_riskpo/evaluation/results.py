"""The graded samples of one benchmark as tables [questions, samples], read from nemo-skills' output files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.outputs import GRADING_ERROR, Line, benchmark_folders, output_files, read_lines


@dataclass(frozen=True)
class Results:
    """One benchmark, Q questions with n samples each."""

    name: str
    keys: list[str]
    """Q: the field `id`, or the problem's text where there is none."""
    problems: list[str]
    """Q, for people to read; empty where the files do not say."""
    sources: list[str]
    """Q: the field `source`; empty where the files do not say."""
    correct: NDArray[np.bool_]
    """[Q, n]; False where the response could not be graded."""
    errors: NDArray[np.bool_]
    """[Q, n]: could not be graded."""
    predicted: list[list[str | None]]
    """[Q][n] final answers; None: no answer."""
    lengths: NDArray[np.float64] | None
    """[Q, n] response tokens; None where the files do not say."""
    truncated: NDArray[np.bool_] | None
    """[Q, n]: cut at the maximum length; None where the files do not say."""
    seconds: float | None
    """From the first start to the last end of a generation."""
    greedy: bool = False
    """The one sample is the greedy one."""

    @property
    def num_questions(self) -> int:
        return self.correct.shape[0]

    @property
    def num_samples(self) -> int:
        return self.correct.shape[1]

    def take(self, rows: Sequence[int]) -> "Results":
        """The given questions, in the given order."""
        return replace(
            self,
            keys=[self.keys[row] for row in rows],
            problems=[self.problems[row] for row in rows],
            sources=[self.sources[row] for row in rows],
            correct=self.correct[rows],
            errors=self.errors[rows],
            predicted=[self.predicted[row] for row in rows],
            lengths=None if self.lengths is None else self.lengths[rows],
            truncated=None if self.truncated is None else self.truncated[rows],
        )


def read_results(folder: Path) -> list[Results]:
    """All benchmarks of an evaluation, ours or nemo-skills'. Raises UsageError: see results_of and outputs.py."""
    found = []
    for name, path in benchmark_folders(folder).items():
        files = output_files(path)
        found.append(results_of(name, {str(file): read_lines(file) for file in files}))
    return found


def results_of(name: str, files: dict[str, list[Line]]) -> Results:
    """The benchmark of which `files` has the lines of each sample, by file name.

    Raises UsageError: files of different length or different questions, a question twice, a line without a verdict.
    """
    first_name, first = next(iter(files.items()))
    keys = [_key(line, f"{first_name}:{number}") for number, line in enumerate(first, 1)]
    if not keys:
        raise UsageError(f"{first_name} has no line; the evaluation has not begun: run it again")
    _check_distinct(keys, first_name)
    for file, lines in files.items():
        _check_same_questions(keys, first_name, lines, file)
    columns = list(files.values())
    rows = list(zip(*columns, strict=True))
    verdicts = [[_verdict(line, f"{file}:{row}") for file, line in zip(files, lines, strict=True)]
                for row, lines in enumerate(rows, 1)]  # fmt: skip
    return Results(
        name=name,
        keys=keys,
        problems=[str(line.get("problem", "")) for line in first],
        sources=[str(line.get("source", "")) for line in first],
        correct=np.array(verdicts, dtype=bool),
        errors=np.array([[bool(line.get(GRADING_ERROR)) for line in lines] for lines in rows]),
        predicted=[[line["predicted_answer"] for line in lines] for lines in rows],
        lengths=_table(rows, "num_generated_tokens", float),
        truncated=_table(rows, "finish_reason", lambda reason: reason == "length"),
        seconds=_seconds(rows),
        greedy=Path(first_name).name == "output.jsonl",
    )


def _key(line: Line, place: str) -> str:
    key = line.get("id", line.get("problem"))
    if key is None:
        raise UsageError(f"{place} has neither `id` nor `problem` (it has: {', '.join(line) or 'nothing'})")
    return str(key)


def _check_distinct(keys: list[str], file: str) -> None:
    key, count = Counter(keys).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{file} has the question {key!r:.60} {count} times; every question needs an id of its own")


def _check_same_questions(keys: list[str], first: str, lines: list[Line], file: str) -> None:
    if len(lines) != len(keys):
        raise UsageError(
            f"{first} has {len(keys)} lines, {file} has {len(lines)}: the evaluation was interrupted; run its command "
            "again, which continues it"
        )
    for number, (key, line) in enumerate(zip(keys, lines, strict=True), 1):
        own = _key(line, f"{file}:{number}")
        if own != key:
            raise UsageError(f"{file}:{number} is the question {own!r:.60}, {first}:{number} is {key!r:.60}")


def _verdict(line: Line, place: str) -> bool:
    for field in ("symbolic_correct", "predicted_answer"):
        if field not in line:
            raise UsageError(f"{place} has no `{field}`: the response was not graded; grade the outputs first")
    verdict = line["symbolic_correct"]
    if verdict not in (0, 1):
        raise UsageError(f"{place}: `symbolic_correct` is {verdict!r:.40}; it must be true or false")
    return bool(verdict)


def _table(rows: Sequence[Sequence[Line]], field: str, convert: Any) -> NDArray[Any] | None:
    if any(line.get(field) is None for lines in rows for line in lines):
        return None
    return np.array([[convert(line[field]) for line in lines] for lines in rows])


def _seconds(rows: Sequence[Sequence[Line]]) -> float | None:
    starts = [line["generation_start_time"] for lines in rows for line in lines if line.get("generation_start_time")]
    ends = [line["generation_end_time"] for lines in rows for line in lines if line.get("generation_end_time")]
    return max(ends) - min(starts) if starts and ends else None
