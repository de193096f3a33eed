"""Filling output files, with an engine and a tokenizer that are plain functions of prompt and seed.

Second way to the files of an evaluation that was interrupted: the same evaluation in one go.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.config import PromptConfig, RewardConfig
from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.benchmarks import Benchmark, load_benchmarks
from megatron_riskpo.evaluation.generate import Sampler, fill, pending_tasks, task_seeds
from megatron_riskpo.evaluation.grading import predicted_answer
from megatron_riskpo.evaluation.outputs import OUTPUT_FIELDS, output_files, read_lines
from megatron_riskpo.evaluation.results import read_results
from megatron_riskpo.rewards.pool import Grade, GraderPool
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig
from tests.evaluation.test_nemo_skills import GOLDEN
from tests.vllm_engines import single_rank

TIMES = ("generation_start_time", "generation_end_time", "generation_time")
END = 0


class Letters:
    """Token ids are code points; END is special."""

    chat_template = None

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def batch_decode(self, responses, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(token) for token in response if token != END) for response in responses]


class Answering:
    """Answers `a + b =` rightly where seed % 3 is 0, wrongly where it is 1, and is cut in the middle where it is 2."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def generate(self, prompts, sampling: SamplingConfig, seeds, on_finished) -> Rollouts:
        self.batches.append(len(prompts))
        assert sampling.group_size == 1
        responses = [self._response(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        for row in reversed(range(len(responses))):
            on_finished(row, responses[row])
        return Rollouts(
            tokens=torch.tensor(
                [token for pair in zip(prompts, responses, strict=True) for part in pair for token in part]
            ),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
            response_lengths=torch.tensor([len(response) for response in responses]),
            rollout_logprobs=torch.zeros(sum(map(len, responses))),
            finished=torch.tensor([response[-1] == END for response in responses]),
        )

    def _response(self, prompt, seed: int) -> list[int]:
        first, _, second, _ = "".join(map(chr, prompt)).split()
        right = str(int(first) + int(second))
        text = (f"\\boxed{{{right}}}", "\\boxed{-1}", "\\boxed{" + right)[seed % 3]
        return [*map(ord, text), *([END] if seed % 3 != 2 else [])]


def write_sums(path: Path, num: int) -> Path:
    lines = [{"problem": f"{i} + {i + 1} =", "expected_answer": str(2 * i + 1), "level": i} for i in range(num)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def benchmarks(tmp_path: Path) -> dict[str, Benchmark]:
    files = [write_sums(tmp_path / "sums.jsonl", 7), write_sums(tmp_path / "more.jsonl", 4)]
    return load_benchmarks(files, Letters(), PromptConfig())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sampler():
    with single_rank(), GraderPool(["math"], 1) as pool:
        yield Sampler(
            Answering(), SamplingConfig(1, 20, 1.0, (END,)), Letters(), pool, RewardConfig(), dist.group.WORLD
        )


def run(
    folder: Path, benchmarks, sampler: Sampler, seeds=range(3), batch: int = 5, stop: Callable[[], bool] = lambda: False
):
    tasks = pending_tasks(folder, benchmarks, seeds, greedy=False)
    return fill(folder, benchmarks, tasks, sampler, batch, stop, lambda line: None), len(tasks)


def contents(folder: Path) -> dict[str, list[dict]]:
    """All lines by file, less the times."""
    return {
        str(path.relative_to(folder)): [
            {key: value for key, value in line.items() if key not in TIMES} for line in read_lines(path)
        ]
        for path in sorted(folder.glob("eval-results/*/output-rs*.jsonl"))
    }


def test_outputs_have_nemo_skills_fields_in_its_order(tmp_path: Path, benchmarks, sampler):
    assert run(tmp_path, benchmarks, sampler) == (True, 33)
    golden = read_lines(GOLDEN / "eval-results" / "sums" / "output-rs0.jsonl")[0]
    for path in output_files(tmp_path / "eval-results" / "sums"):
        for index, line in enumerate(read_lines(path)):
            assert tuple(line) == ("id", "problem", "expected_answer", "level", *OUTPUT_FIELDS)
            assert {key: type(line[key]) for key in OUTPUT_FIELDS if key != "predicted_answer"} == {
                key: type(golden[key]) for key in OUTPUT_FIELDS if key != "predicted_answer"
            }
            assert line["id"] == f"sums-{index}"


def test_lines_say_what_was_answered(tmp_path: Path, benchmarks, sampler):
    run(tmp_path, benchmarks, sampler)
    tasks = pending_tasks(tmp_path / "none", benchmarks, range(3), greedy=False)
    seeds = dict(zip(tasks, task_seeds(benchmarks, tasks), strict=True))
    assert len({seed % 3 for seed in seeds.values()}) == 3
    for task, seed in seeds.items():
        line = read_lines(tmp_path / "eval-results" / task.benchmark / f"output-rs{task.seed}.jsonl")[task.question]
        right = line["expected_answer"]
        expected = [(right, True, "stop"), ("-1", False, "stop"), (None, False, "length")][seed % 3]
        assert (line["predicted_answer"], line["symbolic_correct"], line["finish_reason"]) == expected
        assert line["num_generated_tokens"] == len(line["generation"]) + (line["finish_reason"] == "stop")
    assert {results.name: results.correct.shape for results in read_results(tmp_path)} == {
        "more": (4, 3),
        "sums": (7, 3),
    }


@pytest.mark.parametrize(
    ("response", "grader", "expected"),
    [
        ("so \\boxed{4}", "math", "4"),
        ("2*x+1", "math", None),
        ("2*x+1", "code", "2*x+1"),
        ("```python\nprint(1)\n```", "code", "print(1)\n"),
        ("```python\nprint(1", "code", None),
    ],
)
def test_votes_are_for_answers_or_for_programs(response: str, grader: str, expected: str | None):
    assert predicted_answer(response, grader, RewardConfig(answer_form="boxed")) == expected


def test_an_interrupted_evaluation_goes_on_to_the_same_files(tmp_path: Path, benchmarks, sampler, monkeypatch):
    """And has told the job script that it got further."""
    run(tmp_path / "whole", benchmarks, sampler)
    interrupted = tmp_path / "interrupted"
    monkeypatch.setenv("RISKPO_PROGRESS_FILE", str(tmp_path / "progress"))
    assert run(interrupted, benchmarks, sampler, batch=4, stop=lambda: True)[0] is False
    assert (tmp_path / "progress").exists()
    path = interrupted / "eval-results" / "sums" / "output-rs0.jsonl"
    with path.open("a") as file:
        file.write('{"id": "sums-2", "half')
    assert run(interrupted, benchmarks, sampler, batch=3) == (True, 29)
    assert contents(interrupted) == contents(tmp_path / "whole")
    assert run(interrupted, benchmarks, sampler) == (True, 0)


def test_more_samples_add_files_and_change_none(tmp_path: Path, benchmarks, sampler):
    run(tmp_path, benchmarks, sampler, seeds=range(2))
    before = contents(tmp_path)
    assert run(tmp_path, benchmarks, sampler, seeds=range(4)) == (True, 22)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 4


def test_samples_and_questions_have_seeds_of_their_own(benchmarks):
    tasks = [
        task for task in pending_tasks(Path("none"), benchmarks, range(5), greedy=False) if task.benchmark == "sums"
    ]
    assert len(set(task_seeds(benchmarks, tasks))) == len(tasks)
    assert task_seeds(benchmarks, tasks[::-1]) == task_seeds(benchmarks, tasks)[::-1]


def test_an_error_of_the_grader_is_told_from_a_wrong_answer(tmp_path: Path, benchmarks, sampler):
    class Failing:
        def submit(self, response, reference) -> str:
            return reference.expected_answer

        def gather(self, answers) -> list[Grade]:
            hangs = [int(answer) // 2 % 3 > 0 for answer in answers]
            return [Grade(float("nan"), "hung") if own else Grade(1.0) for own in hangs]

    run(
        tmp_path,
        benchmarks,
        replace(sampler, pool=Failing(), rewards=RewardConfig(max_error_share=1.0)),
        seeds=range(1),
        batch=3,
    )
    _, sums = read_results(tmp_path)
    assert sums.errors[:, 0].tolist() == [False, True, True, False, True, True, False]
    assert sums.correct[:, 0].tolist() == [not error for error in sums.errors[:, 0]]


def test_outputs_of_other_questions_are_refused(tmp_path: Path, benchmarks, sampler):
    run(tmp_path, benchmarks, sampler, seeds=range(1))
    files = [write_sums(tmp_path / "sums.jsonl", 6)]
    with pytest.raises(UsageError, match="has 7 lines, sums only 6"):
        pending_tasks(tmp_path, load_benchmarks(files, Letters(), PromptConfig()), range(1), greedy=False)  # type: ignore[arg-type]
    changed = {"sums": load_benchmarks([write_sums(tmp_path / "sums.jsonl", 9)], Letters(), PromptConfig())["sums"]}  # type: ignore[arg-type]
    changed["sums"].lines[2]["problem"] = "another"
    with pytest.raises(UsageError, match=r"output-rs0.jsonl:3 is not question 3 of sums"):
        pending_tasks(tmp_path, changed, range(1), greedy=False)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "a", "problem": "1 + 1 =", "expected_answer": "2"}] * 2, "has the id 'a' 2 times"),
        ([{"problem": "1", "expected_answer": ""}], "`expected_answer` is empty"),
        ([{"question": "1", "answer": "2"}], "has no `expected_answer`"),
        ([{"problem": "1" * 300, "expected_answer": "2"}], "1 of 1 prompts .* longer than .* set it to 300"),
    ],
)
def test_wrong_question_files_are_usage_errors(tmp_path: Path, lines, message: str):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match=message):
        load_benchmarks([path], Letters(), PromptConfig())  # type: ignore[arg-type]


def test_two_files_of_one_name_are_refused(tmp_path: Path):
    (tmp_path / "b").mkdir()
    files = [write_sums(tmp_path / "x.jsonl", 2), write_sums(tmp_path / "b" / "x.jsonl", 2)]
    with pytest.raises(UsageError, match="2 files are named x"):
        load_benchmarks(files, Letters(), PromptConfig())  # type: ignore[arg-type]
