"""Whole runs through the command line: a base model, RL with both engines, a crash and a resume, signals, a full disk.

Second way to the final weights of a resumed run: the same run in one go. The base model is made once.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import hf_token_logprobs, load_hf

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OPTIONS = """
[run]
steps = 10
seed = 7
ranks = 2
[actor]
tp = 2
[data]
train = "reasoning_gym:chain_sum"
options = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }
train_size = 200
evaluation_size = 16
prompts_per_step = 8
[rollout]
group_size = 4
max_response_tokens = 8
[algorithm]
bundle_size = 4
quantile_source = "tracked"
[optimizer]
lr = 1e-3
[evaluation]
num_samples = 2
ks = [1, 2]
[checkpoint]
every = 5
[bridge]
verify = true
"""
BASE = """
[run]
name = "base"
ranks = 1
[shape]
num_layers = 2
hidden_size = 128
intermediate_size = 256
[data]
train = "reasoning_gym:chain_sum"
options = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }
train_size = 500
[sft]
steps = 30
batch_size = 32
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megatron_riskpo.cli", *map(str, arguments)]


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(folder: Path, *arguments: object, exit_code: int = 0) -> str:
    process = start(folder, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == exit_code, output[-4000:]
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "base.toml").write_text(BASE)
    (folder / "rl.toml").write_text(OPTIONS)
    run(folder, "sft", "base.toml")
    return folder


def train(folder: Path, name: str, *options: object, **kwargs) -> str:
    return run(folder, "train", "rl.toml", "--model.path", "runs/base/hf", "--run.name", name, *options, **kwargs)


def metrics(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "rollout/tokens_per_second"} for row in rows
    ]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "hf" / "model.safetensors")


def kill_after_step(folder: Path, process: subprocess.Popen, name: str, step: int) -> None:
    """SIGKILL to the launcher once the step's metrics are there; its ranks die with it."""
    deadline = time.monotonic() + 240
    path = folder / "runs" / name / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_base_model_is_reused(folder):
    assert "re-using" in run(folder, "sft", "base.toml")


@pytest.mark.parametrize("engine", ["vllm", "megatron"])
def test_killed_run_resumes_bit_for_bit(folder, engine):
    options = ("--rollout.engine", engine)
    train(folder, f"{engine}-whole", *options)
    process = start(
        folder, "train", "rl.toml", "--model.path", "runs/base/hf", "--run.name", f"{engine}-killed", *options
    )
    kill_after_step(folder, process, f"{engine}-killed", step=6)
    assert "resumed" in train(folder, f"{engine}-killed", *options)
    whole, resumed = (metrics(folder, f"{engine}-{kind}") for kind in ("whole", "killed"))
    assert [row["step"] for row in resumed] == list(range(11))
    assert without_times(resumed) == without_times(whole)
    expected = weights(folder, f"{engine}-whole")
    for name, tensor in weights(folder, f"{engine}-killed").items():
        assert torch.equal(tensor, expected[name]), name
    assert max(row["mismatch/logprob_abs_mean"] for row in whole[1:]) < 1e-5


def test_exported_model_equals_actor_and_engine(folder):
    """transformers loads the exported folder; its log-probs of 20 rollouts are the actor's and vLLM's."""
    from transformers import AutoTokenizer

    train(folder, "vllm-whole")  # the run of the test above, if it was made: then there is nothing left to do
    outputs, again = run_on_ranks("tests.exported_model_ranks:score_rollouts_of_trained_actor", 2, folder / "ranks")
    rollouts = outputs["rollouts"]
    assert outputs["step"] == 10
    assert rollouts.num_sequences == 20
    path = folder / "runs" / "vllm-whole" / "hf"
    model = load_hf(path)
    expected = torch.cat(
        [
            hf_token_logprobs(model, sequence)[prompt - 1 :]
            for sequence, prompt in zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(outputs["actor"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(rollouts.rollout_logprobs, expected, rtol=0, atol=1e-4)
    assert torch.equal(outputs["actor"], again["actor"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.decode(tokenizer("1 + 2 =").input_ids) == "1 + 2 ="


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_exits_0(folder, number):
    name = f"signal-{number.name}"
    arguments = ("train", "rl.toml", "--model.path", "runs/base/hf", "--run.name", name)
    process = start(folder, *arguments, "--rollout.engine", "megatron", "--run.steps", "2000")
    path = folder / "runs" / name / "metrics.jsonl"
    while not (path.exists() and '"step": 2,' in path.read_text()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output[-4000:]
    last = metrics(folder, name)[-1]["step"]
    assert (folder / "runs" / name / "checkpoints" / f"step_{last}" / "manifest.json").is_file()
    assert f"stopped by a signal after step {last} of 2000" in output
