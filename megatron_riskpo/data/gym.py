"""The tasks of the reasoning-gym package as endless streams of (problem, answer)."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_riskpo.config import Scalar
from megatron_riskpo.errors import UsageError

# Entries drawn from one seed. The tasks seed entry i with seed + i, so that neighbouring seeds give the same entries
# shifted by one; the seeds used here are hashes of (seed, round) instead.
ROUND = 1000
# Options of every task that the configuration sets elsewhere.
RESERVED_OPTIONS = {"size": "data.train_size and data.evaluation_size", "seed": "run.seed"}


def gym_problems(name: str, options: Mapping[str, Scalar], seed: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Problems of task `name` with their answers and what the task's own verifier needs, without end; the same seed
    gives the same ones, in order.

    Raises UsageError: unknown task or option (names the nearest), an option's value that the task refuses, or a task
    whose answers are not texts.
    """
    _check_options(name, options)
    for index in count():
        round_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
        for entry in _entries(name, options, round_seed):
            problem, answer = entry["question"].strip(), entry["answer"]
            if not isinstance(answer, str) or not answer.strip():
                raise UsageError(f"reasoning_gym task {name} gives no answer text; choose another task")
            yield problem, answer.strip(), _verifier_fields(name, entry)


def _verifier_fields(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """gym_task and gym_entry as JSON values; nothing of an entry that has no JSON form."""
    try:
        return {"gym_task": name, "gym_entry": json.loads(json.dumps(entry))}
    except (TypeError, ValueError):
        return {}


def _entries(name: str, options: Mapping[str, Scalar], seed: int) -> Iterator[dict[str, Any]]:
    try:
        yield from reasoning_gym.create_dataset(name, size=ROUND, seed=seed, **options)
    except (AssertionError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        given = ", ".join(f"{key} = {value!r}" for key, value in options.items()) or "the defaults"
        raise UsageError(
            f"reasoning_gym task {name} refuses its options ({given}): {error or type(error).__name__}; "
            "correct data.options"
        ) from error


def _check_options(name: str, options: Mapping[str, Scalar]) -> None:
    if name not in DATASETS:
        raise UsageError(f"unknown reasoning_gym task {name!r}{_nearest(name, DATASETS)}")
    known = {field.name for field in dataclasses.fields(DATASETS[name][1])} - RESERVED_OPTIONS.keys()
    for option in options:
        if option in RESERVED_OPTIONS:
            raise UsageError(f"data.options may not set {option!r}; use {RESERVED_OPTIONS[option]}")
        if option not in known:
            raise UsageError(
                f"reasoning_gym task {name} has no option {option!r}{_nearest(option, known)} "
                f"(its options: {', '.join(sorted(known))})"
            )


def _nearest(wrong: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.4)
    return f"; did you mean {matches[0]!r}?" if matches else ""
