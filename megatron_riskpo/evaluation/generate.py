"""Fill the output files of an evaluation with what is still missing in them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_riskpo.config import RewardConfig
from megatron_riskpo.data.stream import sample_seeds
from megatron_riskpo.distributed.job import report_progress
from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.benchmarks import Benchmark
from megatron_riskpo.evaluation.grading import SOLVED_ABOVE, predicted_answer, sample_and_grade
from megatron_riskpo.evaluation.outputs import (
    GRADING_ERROR,
    RESULTS_FOLDER,
    Line,
    append_lines,
    output_file,
    read_partial,
)
from megatron_riskpo.rewards.from_config import references_of
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig, SamplingEngine


@dataclass(frozen=True)
class Task:
    """One answer to get: the question's index in its benchmark, and the sample's seed."""

    benchmark: str
    question: int
    seed: int


@dataclass(frozen=True)
class Sampler:
    """What turns tasks into lines of the output files; the same on every rank."""

    engine: SamplingEngine
    sampling: SamplingConfig
    tokenizer: Any
    pool: GraderPool
    rewards: RewardConfig
    world: ProcessGroup

    def answer(self, benchmarks: Mapping[str, Benchmark], tasks: Sequence[Task]) -> list[Line]:
        """A line a task, in order. Collective."""
        start = time.time()
        prompts = [benchmarks[task.benchmark].prompts[task.question] for task in tasks]
        references = self._references(benchmarks, tasks)
        rollouts, rewards = sample_and_grade(
            self.engine, prompts, references, self.sampling, task_seeds(benchmarks, tasks), self.tokenizer, self.pool,
            self.rewards, self.world,
        )  # fmt: skip
        end = time.time()
        texts = self.tokenizer.batch_decode(rollouts.responses(), skip_special_tokens=True)
        lines = []
        for row, (task, text) in enumerate(zip(tasks, texts, strict=True)):
            own = benchmarks[task.benchmark].lines[task.question]
            verdict = _verdict(float(rewards.matrix[row, 0]), bool(rewards.errors[row, 0]))
            answer = {"predicted_answer": predicted_answer(text, references[row].grader, self.rewards)}
            lines.append({**own, **_generation(rollouts, row, text, start, end), **answer, **verdict})
        return lines

    def _references(self, benchmarks: Mapping[str, Benchmark], tasks: Sequence[Task]) -> list[Reference]:
        """One a task; tasks of one question share it, so that equal answers are graded once."""
        places = list(dict.fromkeys((task.benchmark, task.question) for task in tasks))
        questions = [benchmarks[name].questions[index] for name, index in places]
        shared = dict(zip(places, references_of(questions, self.rewards), strict=True))
        return [shared[task.benchmark, task.question] for task in tasks]


def pending_tasks(folder: Path, benchmarks: Mapping[str, Benchmark], seeds: Sequence[int], greedy: bool) -> list[Task]:
    """The answers that the files below `folder` lack, question by question.

    A file that was being written when the process was killed loses its half-written last line. Raises UsageError where
    a file's lines are not those of the benchmark's first questions.
    """
    tasks = []
    for benchmark in benchmarks.values():
        for seed in seeds:
            path = folder / RESULTS_FOLDER / benchmark.name / output_file(seed, greedy)
            done = read_partial(path)
            _check_belongs(done, benchmark, path)
            tasks += [Task(benchmark.name, index, seed) for index in range(len(done), len(benchmark.lines))]
    order = {name: position for position, name in enumerate(benchmarks)}
    # By question: the samples of a question lie in the same batch, where they share the prompt's cache.
    return sorted(tasks, key=lambda task: (order[task.benchmark], task.question, task.seed))


def fill(
    folder: Path, benchmarks: Mapping[str, Benchmark], tasks: Sequence[Task], sampler: Sampler, batch_size: int,
    is_stopping: Callable[[], bool], say: Callable[[str], None],
) -> bool:  # fmt: skip
    """Answer the tasks, batch_size at a time; after each batch its lines are on the disk. False: stopped before the
    end. Collective; rank 0 writes."""
    greedy = sampler.sampling.temperature == 0
    for number, batch in _batches(tasks, batch_size):
        lines = sampler.answer(benchmarks, batch)
        if sampler.world.rank() == 0:
            for (name, seed), group in _by_file(batch, lines).items():
                append_lines(folder / RESULTS_FOLDER / name / output_file(seed, greedy), group)
            report_progress()
        say(f"{min(number + batch_size, len(tasks))} of {len(tasks)} answers")
        if number + batch_size < len(tasks) and is_stopping():
            return False
    dist.barrier(group=sampler.world)
    return True


def task_seeds(benchmarks: Mapping[str, Benchmark], tasks: Sequence[Task]) -> list[int]:
    """The seed of each answer: of the sample's seed and the question's index, whatever else is asked in the same batch.
    So an evaluation that goes on gives the answers of one that was not interrupted."""
    lengths = {name: len(benchmark.lines) for name, benchmark in benchmarks.items()}
    kinds = {(task.benchmark, task.seed) for task in tasks}
    tables = {(name, seed): sample_seeds(seed, 0, lengths[name], "evaluation") for name, seed in kinds}
    return [tables[task.benchmark, task.seed][task.question] for task in tasks]


def _batches(tasks: Sequence[Task], size: int) -> Iterator[tuple[int, Sequence[Task]]]:
    return ((start, tasks[start : start + size]) for start in range(0, len(tasks), size))


def _by_file(tasks: Sequence[Task], lines: Sequence[Line]) -> dict[tuple[str, int], list[Line]]:
    files: dict[tuple[str, int], list[Line]] = {}
    for task, line in zip(tasks, lines, strict=True):
        files.setdefault((task.benchmark, task.seed), []).append(line)
    return files


def _generation(rollouts: Rollouts, row: int, text: str, start: float, end: float) -> Line:
    """Times are those of the batch that the response was sampled and graded in."""
    return {
        "generation": text,
        "num_generated_tokens": int(rollouts.response_lengths[row]),
        "finish_reason": "stop" if rollouts.finished[row] else "length",
        "generation_start_time": start,
        "generation_end_time": end,
        "generation_time": end - start,
    }


def _verdict(reward: float, failed: bool) -> Line:
    if failed:
        return {"symbolic_correct": False, GRADING_ERROR: True}
    verdict: Line = {"symbolic_correct": reward > SOLVED_ABOVE}
    return verdict if reward in (0.0, 1.0) else {**verdict, "reward": reward}


def _check_belongs(done: Sequence[Line], benchmark: Benchmark, path: Path) -> None:
    if len(done) > len(benchmark.lines):
        raise UsageError(
            f"{path} has {len(done)} lines, {benchmark.name} only {len(benchmark.lines)}; choose another --out"
        )
    for number, (line, own) in enumerate(zip(done, benchmark.lines, strict=False), 1):
        if any(line.get(field) != own.get(field) for field in ("id", "problem", "expected_answer")):
            raise UsageError(f"{path}:{number} is not question {number} of {benchmark.name}; choose another --out")
