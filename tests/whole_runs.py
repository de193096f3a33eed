"""Whole runs through the command line, as a user starts them: a folder with a base model, and what a run leaves."""

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
verify = "probe"
"""
# With no option that only RiskPO or only a generated task has.
PLAIN = "\n".join(
    line for line in OPTIONS.splitlines() if not line.startswith(("options", "[algorithm]", "bundle", "quantile"))
)
# All that a step can do besides: refills, shaped rewards, running pass rates, a reference model, corrected mismatch.
EVERYTHING = (
    *("--rollout.dynamic_sampling", "true", "--rollout.max_refills", "2", "--rollout.max_response_tokens", "12"),
    *("--rewards.overlong_buffer_tokens", "4", "--algorithm.bundling", "sorted", "--actor.mini_batches", "2"),
    *("--loss.kl_coefficient", "0.05", "--mismatch.correction", "tis", "--mismatch.abort_above", "1e-3"),
    # Small steps: the weakly trained model must go on solving something, or there is nothing to keep.
    *("--optimizer.lr", "1e-4"),
    *("--evaluation.every", "5", "--checkpoint.keep", "1", "--checkpoint.keep_best", "eval/heldout/pass@2"),
)
# Where a second rank would show nothing more, at half the processor time.
ONE_RANK = ("--rollout.engine", "megatron", "--run.ranks", "1", "--actor.tp", "1")
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


def make_folder(folder: Path) -> Path:
    """With the configurations and the base model."""
    (folder / "base.toml").write_text(BASE)
    (folder / "rl.toml").write_text(OPTIONS)
    (folder / "plain.toml").write_text(PLAIN)
    run(folder, "sft", "base.toml")
    return folder


def train(folder: Path, name: str, *options: object, **kwargs) -> str:
    return run(folder, "train", "rl.toml", "--model.path", "runs/base/hf", "--run.name", name, *options, **kwargs)


def metrics(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    """Nor anything else that the machine decides."""
    measured = ("time/", "perf/", "memory/", "rollout/tokens_per_second")
    return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in rows]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "hf" / "model.safetensors")


def wait_for_step(folder: Path, process: subprocess.Popen, name: str, step: int) -> None:
    """Until the step's metrics are there."""
    deadline = time.monotonic() + 240
    path = folder / "runs" / name / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        if time.monotonic() > deadline:
            process.kill()  # its ranks die with it
            pytest.fail(f"step {step} did not come:\n{process.communicate()[0][-4000:]}")
        time.sleep(0.05)


def signal_after_step(folder: Path, process: subprocess.Popen, name: str, step: int, number: signal.Signals) -> str:
    """Send the signal to the launcher once the step's metrics are there; the output."""
    wait_for_step(folder, process, name, step)
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


def error_line(output: str) -> str:
    """The one line that tells of the error."""
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "Traceback" not in output
    return line
