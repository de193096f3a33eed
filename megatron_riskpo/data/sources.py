"""Where questions come from: a reasoning-gym task, or a JSONL file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_riskpo.config import Scalar
from megatron_riskpo.errors import UsageError

GYM_PREFIX = "reasoning_gym:"
KNOWN_FIELDS = ("problem", "expected_answer", "solution", "reference_solution", "source")
"""Fields of a JSONL line that a Question has by name."""


@dataclass(frozen=True)
class Question:
    """One question with one verifiable answer."""

    problem: str
    expected_answer: str
    source: str
    """Where it comes from: reasoning_gym:NAME, or file:line."""
    solution: str | None = None
    """A worked response, where the source has one."""
    data_source: str = ""
    """What metrics and graders tell apart: the field `source` of a JSONL line, else the file's or the task's name."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """All other fields, JSON values: what a grader may need."""


def read_source(source: str, *, size: int, seed: int, options: Mapping[str, Scalar]) -> list[Question]:
    """`size` questions of a reasoning-gym task ("reasoning_gym:NAME" with its options; the same seed gives the same
    questions, repeats are possible), or all of a JSONL file (`size` and `seed` do not matter then).

    A JSONL line has `problem` and `expected_answer` (not needed beside `tests`), and may have `solution` (or
    `reference_solution`), `source` and `grader`; other fields go to the grader. Raises UsageError that names what is
    wrong: the task or option and the nearest right one, or file:line.
    """
    if not source.startswith(GYM_PREFIX):
        return _read_jsonl(Path(source), options)
    from megatron_riskpo.data.gym import gym_problems  # importing reasoning-gym takes about 1 s

    name = source.removeprefix(GYM_PREFIX)
    drawn = islice(gym_problems(name, options, seed), size)
    return [Question(problem, answer, source, None, name, fields) for problem, answer, fields in drawn]


def _read_jsonl(path: Path, options: Mapping[str, Scalar]) -> list[Question]:
    if options:
        raise UsageError(
            f"data.options {sorted(options)} are for a reasoning_gym task, not for the file {path}; drop them"
        )
    if not path.is_file():
        raise UsageError(f"no question file {path}; give a JSONL file or {GYM_PREFIX}NAME")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    questions = [_parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise UsageError(f"{path} has no question; it needs lines with `problem` and `expected_answer`")
    return questions


def _parse_line(line: str, place: str) -> Question:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is no JSON ({error}): {line[:60]!r}; one object a line is needed") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{place} is no JSON object but {line[:60]!r}; give `problem` and `expected_answer`")
    solution = fields.get("solution") or fields.get("reference_solution")
    if solution is not None and not isinstance(solution, str):
        raise UsageError(f"{place}: `solution` is no text but {solution!r:.60}; put it in quotes")
    tests_alone = "tests" in fields and not fields.get("expected_answer")
    answer = "" if tests_alone else _text(fields, "expected_answer", place)
    source = fields.get("source") or Path(place.rpartition(":")[0]).stem
    if not isinstance(source, str):
        raise UsageError(f"{place}: `source` is no text but {source!r:.60}; put it in quotes")
    others = {key: value for key, value in fields.items() if key not in KNOWN_FIELDS}
    return Question(_text(fields, "problem", place), answer, place, solution, source, others)


def _text(fields: dict[str, Any], name: str, place: str) -> str:
    """The field's text without outer white space; a bare JSON number counts as its text."""
    if name not in fields:
        raise UsageError(f"{place} has no `{name}` (it has: {', '.join(fields) or 'nothing'}); add it")
    value = fields[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{place}: `{name}` is empty or no text ({value!r:.60}); correct it")
    return value.strip()
