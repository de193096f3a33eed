"""`riskpo evaluate` with real vLLM on a random tiny model. Second way to a greedy answer: transformers; to the files of
an evaluation that was killed, or that asked a server: one in process without a break."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model
from megatron_riskpo.data.tokenizer import stop_token_ids
from tests.tiny_models import load_hf, make_tiny_qwen2

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MAX_TOKENS = 12
LIMITS = ("--rollout.max_response_tokens", str(MAX_TOKENS), "--data.max_prompt_tokens", "20")
TIMES = {"generation_start_time", "generation_end_time", "generation_time"}
# Right is an answer of even length. The second question is not graded as long as the file `hold` is there.
GRADING = """
import pathlib, time
def grade(response, expected_answer):
    while expected_answer == "5" and pathlib.Path("hold").exists():
        time.sleep(0.05)
    return len(response) % 2 == 0
"""
# A batch has the four answers to one question.
GRADED = (
    *("--rewards.grader", "grading.py:grade", "--rewards.gold_checks", "0", "--rewards.timeout_s", "200"),
    *("--num-samples", "4", "--rollout.max_num_seqs", "1"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a model and two question files."""
    folder = tmp_path_factory.mktemp("evaluation")
    train_character_model(["0123456789 + - ="] * 20, folder / "tokenizer.model")
    tokenizer = qwen2_tokenizer(folder / "tokenizer.model")
    make_tiny_qwen2(folder / "model", tied=True, seed=0, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "model")
    for name, num in (("sums", 9), ("more", 4)):
        lines = [{"problem": f"{i} + {i + 3} =", "expected_answer": str(2 * i + 3)} for i in range(num)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "grading.py").write_text(GRADING)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, list[dict]]:
    """What an evaluation without a break writes."""
    evaluate(folder, *GRADED, "--out", "whole")
    return contents(folder / "whole")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_riskpo.cli", *arguments, *LIMITS]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def evaluate(folder: Path, *arguments: str) -> str:
    process = start(folder, "evaluate", "--model", "model", "--data", "sums.jsonl", *arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def contents(out: Path) -> dict[str, list[dict]]:
    """All lines by file, less the times."""
    return {
        path.name: [{key: value for key, value in line.items() if key not in TIMES} for line in outputs(path)]
        for path in sorted(out.glob("eval-results/sums/output-rs*.jsonl"))
    }


def outputs(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy_answer(model: torch.nn.Module, prompt: list[int], stops: tuple[int, ...]) -> list[int]:
    tokens = list(prompt)
    for _ in range(MAX_TOKENS):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def test_greedy_answers_are_those_of_transformers(folder: Path):
    evaluate(folder, "more.jsonl", "--evaluation.temperature", "0", "--out", "greedy")
    model, tokenizer = load_hf(folder / "model"), qwen2_tokenizer(folder / "tokenizer.model")
    stops = stop_token_ids(folder / "model", tokenizer)
    for name, num in (("sums", 9), ("more", 4)):
        lines = outputs(folder / "greedy" / "eval-results" / name / "output.jsonl")
        assert len(lines) == num
        for line in lines:
            answer = greedy_answer(model, tokenizer.encode(line["problem"]), stops)
            assert line["generation"] == tokenizer.decode(answer, skip_special_tokens=True)
            assert line["num_generated_tokens"] == len(answer)
            assert line["finish_reason"] == ("stop" if answer[-1] in stops else "length")


def test_two_ranks_add_samples_to_what_one_rank_began(folder: Path):
    evaluate(folder, "--num-samples", "2", "--out", "sampled")
    first = [outputs(folder / "sampled" / "eval-results" / "sums" / f"output-rs{seed}.jsonl") for seed in range(2)]
    shown = evaluate(folder, "--num-samples", "4", "--out", "sampled", "--run.ranks", "2")
    assert "18 answers were there already" in shown
    assert "9 x 4" in shown
    again = [outputs(folder / "sampled" / "eval-results" / "sums" / f"output-rs{seed}.jsonl") for seed in range(4)]
    assert again[:2] == first
    assert len({line["generation"] for lines in again for line in lines}) > 9
    metrics = json.loads((folder / "sampled" / "eval-results" / "metrics.json").read_text())
    assert metrics["sums"]["pass@1[avg-of-4]"]["num_entries"] == 9


def test_a_killed_evaluation_goes_on_to_the_same_files(folder: Path, whole: dict[str, list[dict]]):
    (folder / "hold").touch()
    process = start(folder, "evaluate", "--model", "model", "--data", "sums.jsonl", *GRADED, "--out", "killed")
    said = ""
    while "4 of 36 answers" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert {name: len(lines) for name, lines in contents(folder / "killed").items()} == dict.fromkeys(whole, 1)
    (folder / "hold").unlink()
    assert "4 answers were there already" in evaluate(folder, *GRADED, "--out", "killed")
    assert contents(folder / "killed") == whole
    for name in ("eval-results/metrics.json", "intervals.json"):
        written = [json.loads((folder / out / name).read_text()) for out in ("killed", "whole")]
        for document in written:
            for mode in document["sums"].values():
                if isinstance(mode, dict):
                    mode.pop("gen_seconds", None)
        assert written[0] == written[1]


def test_servers_give_the_answers_of_the_engine_in_process(folder: Path, whole: dict[str, list[dict]]):
    server = start(folder, "serve", "--endpoint", "server.json", "model")
    try:
        while not (folder / "server.json").exists():
            assert server.poll() is None, server.communicate()[0]
            time.sleep(0.1)
        url = json.loads((folder / "server.json").read_text())["url"]
        evaluate(folder, *GRADED, "--out", "served", "--server", url)
    finally:
        server.terminate()
        said, _ = server.communicate(timeout=60)
    assert server.returncode == 0, said
    assert contents(folder / "served") == whole
    assert 0 < sum(line["symbolic_correct"] for lines in whole.values() for line in lines) < 36
