"""What a published data set's columns mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_riskpo.errors import UsageError

Entry = dict[str, Any]
"""A question file's line, less its id: problem, expected_answer and whatever the grader or the reader wants besides."""


class Unusable(Exception):
    """A row that no question can be made of; says why, in words that are counted."""


@dataclass(frozen=True)
class Recipe:
    """One data set."""

    convert: Callable[[Mapping[str, Any]], Entry]
    """A question out of a row; raises Unusable."""
    columns: tuple[tuple[str, ...], ...]
    """Columns that a row must have; of each tuple one (owners name them differently)."""
    hub: tuple[str, tuple[str | None, ...], str]
    """Repository, configurations (all are read) and split on the Hugging Face hub."""
    carried: tuple[str, ...] = ()
    """Columns that go along as they are, where they are there."""

    def entry(self, row: Mapping[str, Any], place: str) -> Entry:
        """The question of a row. Raises Unusable; UsageError where a column is missing."""
        missing = [names for names in self.columns if not any(name in row for name in names)]
        if missing:
            raise UsageError(
                f"{place} has no column {' or '.join(missing[0])} (it has: {', '.join(map(str, row))}); is this the "
                "right data set?"
            )
        carried = {name: row[name] for name in self.carried if row.get(name) is not None}
        return {**self.convert(row), **carried}


def first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of the columns that the row has; None: of none."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def answer_text(value: Any) -> str:
    """An answer column's value: text, a number (27.0 is 27), or a list with one of them; empty where there is none.

    Raises Unusable for several answers.
    """
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise Unusable("several answers")
        return answer_text(value[0]) if value else ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip().strip("$").strip()
