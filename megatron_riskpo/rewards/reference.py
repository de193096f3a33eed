"""What the graders know of a question, and how a run chooses a grader for each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_riskpo.errors import UsageError

AnswerForm = Literal["any", "boxed", "hash", "tag"]
BUILT_IN = {
    "math": (), "choice": ("choices",), "exact": (), "regex": ("pattern",), "json": (),
    "numeric": ("tolerance", "absolute_tolerance"), "reasoning_gym": ("gym_task", "gym_entry"),
    "code": ("tests", "entry_point", "program_template"),
}  # fmt: skip
"""The built-in graders, with the fields of a question that each reads beside the expected answer."""
REQUIRED_FIELDS = {"regex": ("pattern",), "code": ("tests",), "reasoning_gym": ("gym_task", "gym_entry")}
"""Those that a question must have."""


@dataclass(frozen=True)
class Reference:
    """What a response to one question is graded by."""

    expected_answer: str
    grader: str = "math"
    """One of BUILT_IN, module:function, FILE.py:function, or the address of a server."""
    source: str = ""
    """The data source, by which metrics are kept apart."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The question's other fields, JSON values: the tests of a program, a pattern, a tolerance."""


def reference(
    expected_answer: str, source: str, fields: Mapping[str, Any], default: str, by_source: Mapping[str, str], place: str
) -> Reference:
    """The question's grader is its own field `grader`, else what `by_source` has for its source, else `default`.

    `place` is for the error. Raises UsageError: an unknown grader, or one that needs a field that is not there. Data
    may name built-in graders only: a function or a server is the user's choice, since it gets what a model wrote.
    """
    own = fields.get("grader")
    if own is not None and own not in BUILT_IN:
        raise UsageError(
            f"{place}: `grader` is {own!r:.60}, which is not built in ({', '.join(BUILT_IN)}); name functions and "
            "servers in the configuration: rewards.graders.SOURCE"
        )
    grader = own or by_source.get(source, default)
    check_grader_name(grader)
    missing = [name for name in REQUIRED_FIELDS.get(grader, ()) if name not in fields]
    if missing:
        raise UsageError(
            f"{place}: the grader {grader} needs the field `{missing[0]}`; add it, or choose another grader"
        )
    read = BUILT_IN.get(grader, fields.keys() - {"grader"})
    return Reference(expected_answer, grader, source, {key: fields[key] for key in fields if key in read})


def check_grader_name(grader: str) -> None:
    """Raise UsageError unless it is a built-in grader's name, or has the form of a function or an address."""
    if grader not in BUILT_IN and ":" not in grader:
        raise UsageError(
            f"unknown grader {grader!r}: it cannot be imported; choose one of {', '.join(BUILT_IN)}, or name "
            "module:function, FILE.py:function or http://HOST:PORT/PATH"
        )


def rows_by_source(sources: Iterable[str]) -> dict[str, list[int]]:
    """{source: positions}, by name; empty where all are of one source: there is nothing to tell apart."""
    rows: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows.setdefault(source, []).append(row)
    return {source: rows[source] for source in sorted(rows)} if len(rows) > 1 else {}


def graders_of(references: Iterable[Reference]) -> list[str]:
    """The different graders, in order."""
    return list(dict.fromkeys(item.grader for item in references))
