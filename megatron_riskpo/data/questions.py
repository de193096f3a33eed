"""The questions of a run: which are for training and which for evaluation.

The rule is a property of the question's text: a fixed tenth of all possible problems, chosen by their hash, is held
out. So the warm start, the RL run and runs with other seeds never train on any of them, without knowing of each other,
and runs are compared on the same evaluation questions.
"""

import hashlib
from collections.abc import Callable, Mapping

from megatron_riskpo.config import DataConfig, Scalar
from megatron_riskpo.data.overlap import without_overlap
from megatron_riskpo.data.sources import GYM_PREFIX, Question, read_source
from megatron_riskpo.errors import UsageError

__all__ = ["Question", "is_held_out", "load_evaluation_sets", "load_questions", "load_split"]

HELD_OUT_SHARE = 0.1
# Draws from a task per question wanted, before the task is called too small: 10 times what the share needs.
MAX_DRAWS = 100
# Evaluation questions do not depend on run.seed.
EVALUATION_SEED = 20251001


def is_held_out(problem: str) -> bool:
    """Whether a problem is never trained on; white space does not matter."""
    digest = hashlib.sha256(" ".join(problem.split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def load_questions(source: str, *, size: int, seed: int, options: Mapping[str, Scalar]) -> list[Question]:
    """Training questions of `source`, those that are not held out: `size` of a task, or all such of a file.

    Raises UsageError: see read_source; or nothing is left.
    """
    # 1.25 > 1 / (1 - HELD_OUT_SHARE), with room for chance
    drawn = read_source(source, size=size + size // 4 + 100, seed=seed, options=options)
    kept = [question for question in drawn if not is_held_out(question.problem)]
    if not kept:
        raise UsageError(f"{source} has {len(drawn)} question(s), all of them held out from training; give more")
    return kept[:size] if source.startswith(GYM_PREFIX) else kept


def load_split(data: DataConfig, seed: int) -> tuple[list[Question], list[Question]]:
    """(training questions, `data.evaluation_size` distinct evaluation questions none of which is trained on).

    With a file as data.evaluation its first questions are taken and removed from the training questions, also where
    they are typeset in another way (overlap.py); otherwise both come from what is_held_out says, evaluation questions
    from the first of data.sources. Raises UsageError: too few evaluation questions; see read_source.
    """
    source = data.evaluation or next(iter(data.sources), data.train)
    if data.evaluation and not source.startswith(GYM_PREFIX):
        evaluation = _exactly(read_source(source, size=0, seed=0, options={}), data, "question(s)")
        drawn = _training_questions(data, seed, read_source)
        training, _ = without_overlap(drawn, evaluation)
        if not training:
            raise UsageError(f"all {len(drawn)} questions of {data.train} are in {source} as well; give others")
        return training, evaluation
    return _training_questions(data, seed, load_questions), _held_out_questions(source, data)


def load_evaluation_sets(data: DataConfig) -> dict[str, list[Question]]:
    """The questions of data.evaluation_sets, by name. Raises UsageError: see read_source."""
    return {name: read_source(path, size=0, seed=0, options={}) for name, path in data.evaluation_sets.items()}


def _training_questions(data: DataConfig, seed: int, read: Callable[..., list[Question]]) -> list[Question]:
    """All of data.sources one after another, or of data.train."""
    sources = list(data.sources) or [data.train]
    return [
        question
        for source in sources
        for question in read(source, size=data.train_size, seed=seed, options=_options(data, source))
    ]


def _held_out_questions(source: str, data: DataConfig) -> list[Question]:
    num_drawn, found = 10 * data.evaluation_size, []
    while len(found) < data.evaluation_size:
        drawn = read_source(source, size=num_drawn, seed=EVALUATION_SEED, options=_options(data, source))
        found = list({q.problem: q for q in drawn if is_held_out(q.problem)}.values())
        if not source.startswith(GYM_PREFIX) or num_drawn >= MAX_DRAWS * data.evaluation_size:
            break
        num_drawn *= 2
    return _exactly(found, data, f"held-out problem(s) among {len(drawn)} questions")


def _exactly(found: list[Question], data: DataConfig, what: str) -> list[Question]:
    """The first data.evaluation_size different questions."""
    distinct = list({question.problem: question for question in found}.values())
    if len(distinct) < data.evaluation_size:
        raise UsageError(
            f"{data.evaluation or data.train} has only {len(distinct)} {what}, data.evaluation_size is "
            f"{data.evaluation_size}; lower it, or give a harder task or another data.evaluation"
        )
    return distinct[: data.evaluation_size]


def _options(data: DataConfig, source: str) -> dict[str, Scalar]:
    """The task's options; a JSONL source beside a task has none."""
    all_files = not any(s.startswith(GYM_PREFIX) for s in (*(data.sources or [data.train]), data.evaluation))
    return dict(data.options) if all_files or source.startswith(GYM_PREFIX) else {}
