"""`riskpo evaluate` with real vLLM on a random tiny model. Second way to a greedy answer: transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model
from megatron_riskpo.data.tokenizer import stop_token_ids
from tests.tiny_models import load_hf, make_tiny_qwen2

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MAX_TOKENS = 12


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
    return folder


def evaluate(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_riskpo.cli", "evaluate", "--model", "model", "--data", "sums.jsonl"]
    limits = ("--rollout.max_response_tokens", str(MAX_TOKENS), "--data.max_prompt_tokens", "20")
    done = subprocess.run(
        [*command, *arguments, *limits], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
