"""Runs on programs and sums together: each answer graded by its own grader, the sandbox a condition of starting.

Second way to a program's reward: the answer as a syntax tree of sums and products, computed here. Not tested: that
rewards rise, which takes minutes (docs/rewards.md has such a run).
"""

import ast
import json
import os
import random
import runpy
from pathlib import Path

import pytest

from tests.sandboxes import needs_sandbox
from tests.whole_runs import run

pytestmark = [pytest.mark.slow, needs_sandbox]

ROOT = Path(__file__).parents[1]
SFT = """
[run]
name = "base"
ranks = 1
[shape]
num_layers = 2
[data]
train = "mixed_sft.jsonl"
[sft]
steps = 80
batch_size = 32
"""
RL = """
[run]
steps = 2
ranks = 1
[model]
path = "runs/base/hf"
[data]
train = "mixed.jsonl"
evaluation_size = 8
prompts_per_step = 8
[rollout]
engine = "megatron"
group_size = 4
max_response_tokens = 14
[algorithm]
bundle_size = 4
[rewards]
answer_form = "boxed"
format_bonus = 0.125
gold_checks = 8
[evaluation]
num_samples = 2
ks = [1]
[logging]
samples = 8
samples_every = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    tool = runpy.run_path(str(ROOT / "tools" / "make_programs.py"))
    code = list(tool["programs"]())[::7]
    mixed = [*code, *list(tool["sums"](random.Random(1)))[::7]]
    tool["write"](folder / "mixed.jsonl", mixed)
    tool["write"](folder / "mixed_sft.jsonl", (example for question in mixed for example in tool["solved"](question)))
    (folder / "sft.toml").write_text(SFT)
    (folder / "rl.toml").write_text(RL)
    run(folder, "sft", "sft.toml")
    return folder


def value(tree: ast.AST, x: int) -> int:
    """Of an expression of x, integers, + and *; ValueError for anything else."""
    match tree:
        case ast.Expression():
            return value(tree.body, x)
        case ast.Constant(int(number)) if not isinstance(number, bool):
            return number
        case ast.Name("x"):
            return x
        case ast.BinOp(left, ast.Add(), right):
            return value(left, x) + value(right, x)
        case ast.BinOp(left, ast.Mult(), right):
            return value(left, x) * value(right, x)
    raise ValueError(ast.dump(tree))


def is_right_program(answer: str, expected: str) -> bool:
    try:
        tree = ast.parse(answer.strip(), mode="eval")
        return all(value(tree, x) == value(ast.parse(expected, mode="eval"), x) for x in range(-5, 12))
    except (SyntaxError, ValueError):
        return False


def test_each_source_has_its_own_grader_and_metrics(folder: Path):
    run(folder, "train", "rl.toml", "--run.name", "mixed")
    rows = [json.loads(line) for line in (folder / "runs/mixed/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        samples = (folder / f"runs/mixed/rollouts/step_{row['step']}.jsonl").read_text().splitlines()
        by_source: dict[str, list[float]] = {"programs": [], "sums": []}
        for sample in map(json.loads, samples):
            is_program = "=" not in sample["problem"]
            answer, expected = sample["response"], sample["expected_answer"]
            right = is_right_program(answer, expected) if is_program else answer == f"\\boxed{{{expected}}}"
            assert sample["reward"] == right, sample
            has_form = answer.startswith("\\boxed{") and "}" in answer
            assert sample.get("shaped_reward", sample["reward"]) == right + 0.125 * has_form
            by_source["programs" if is_program else "sums"].append(sample["reward"])
        assert len(samples) == 32, "all of the step's responses"
        for source, rewards in by_source.items():
            assert row[f"reward/{source}/mean"] == pytest.approx(sum(rewards) / len(rewards))
            assert row[f"reward/{source}/errors"] == 0
        assert row["reward/mean"] == pytest.approx(sum(map(sum, by_source.values())) / 32)


def test_without_a_sandbox_the_run_does_not_start(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/nowhere")
    said = run(folder, "train", "rl.toml", "--run.name", "none", exit_code=2)
    assert "programs cannot be graded, no working sandbox (bubblewrap): bubblewrap (bwrap) is not installed" in said
    assert "apt-get install bubblewrap libseccomp2" in said
