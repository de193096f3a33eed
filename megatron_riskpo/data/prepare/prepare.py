"""From rows to a question file."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_riskpo.config import PromptConfig
from megatron_riskpo.data.prepare import code, geometry, mathematics
from megatron_riskpo.data.prepare.checks import Tally, apart_from, complete, distinct, short_enough
from megatron_riskpo.data.prepare.recipe import Entry, Recipe, Unusable
from megatron_riskpo.data.prepare.rows import hub_rows, read_rows
from megatron_riskpo.data.sources import KNOWN_FIELDS, Question, read_source
from megatron_riskpo.errors import UsageError

RECIPES: dict[str, Recipe] = {**mathematics.RECIPES, **code.RECIPES, **geometry.RECIPES}


@dataclass(frozen=True)
class Limits:
    """What prepared questions must keep to."""

    exclude: tuple[Path, ...] = ()
    """Question files of which none of them may be."""
    tokenizer: Path | None = None
    prompt: PromptConfig = PromptConfig()
    """How a run asks them; by itself the bare problem."""
    max_prompt_tokens: int = 0
    """Tokens of a question's prompt; needs the tokenizer."""


def published_entries(name: str, files: Sequence[Path], split: str | None, tally: Tally) -> Iterator[Entry]:
    """The questions of a published data set, one after another, from local files or, without any, from the hub.

    Raises UsageError: an unknown data set, a missing file or column.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise UsageError(f"unknown data set {name!r}; there are {', '.join(RECIPES)} and reasoning_gym:TASK")
    repository, configs, default_split = recipe.hub
    rows = read_rows(files) if files else hub_rows(repository, configs, split or default_split)
    return _converted(recipe, rows, tally)


def checked(entries: Iterable[Entry], limits: Limits, tally: Tally) -> list[Entry]:
    """Those that pass every check. Raises UsageError where none is left, or a file or tokenizer is missing."""
    kept = distinct(complete(entries, tally), tally)
    others = [q.problem for file in limits.exclude for q in read_source(str(file), size=0, seed=0, options={})]
    kept = apart_from(kept, others, tally)
    if limits.tokenizer is not None:
        kept = short_enough(kept, _prompts(kept, limits.tokenizer, limits.prompt), limits.max_prompt_tokens, tally)
    if not kept:
        raise UsageError(f"no question is left ({'; '.join(tally.lines()) or 'the file is empty'})")
    return kept


def _prompts(entries: Sequence[Entry], tokenizer: Path, config: PromptConfig) -> list[list[int]]:
    """Token ids, as a run makes them of the written file."""
    from megatron_riskpo.data.prompts import encode_all
    from megatron_riskpo.data.tokenizer import load_tokenizer

    questions = [
        Question(entry["problem"], "", "", fields={k: v for k, v in entry.items() if k not in KNOWN_FIELDS})
        for entry in entries
    ]
    return encode_all(questions, load_tokenizer(tokenizer, "--tokenizer"), config)


def write_questions(path: Path, name: str, entries: Sequence[Entry]) -> None:
    """Write the file in one move, each question with an id and its data source."""
    draft = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for index, entry in enumerate(entries):
            line = {"id": f"{name}-{index}", **entry, "source": entry.get("source", name)}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    os.replace(draft, path)


def _converted(recipe: Recipe, rows: Iterator[tuple[str, Mapping[str, Any]]], tally: Tally) -> Iterator[Entry]:
    for place, row in rows:
        try:
            yield recipe.entry(row, place)
        except Unusable as reason:
            tally.drop(str(reason))
        except (KeyError, TypeError, IndexError, ValueError, SyntaxError) as error:
            described = " ".join(str(error).split())[:120]
            raise UsageError(
                f"{place} is not laid out as its data set is published ({type(error).__name__}: {described})"
            ) from error
