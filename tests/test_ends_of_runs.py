"""How whole runs end that do not reach their last step: signals, a stopped rank, a full disk, wrong input."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_riskpo.checkpoint.manifest import corrupted_files, read_manifest
from tests.whole_runs import (
    ONE_RANK,
    error_line,
    make_folder,
    metrics,
    run,
    signal_after_step,
    start,
    train,
    wait_for_step,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("runs"))


def test_mismatch_beyond_the_threshold_ends_the_run_in_one_line(folder):
    options = ("--rollout.engine", "megatron", "--mismatch.abort_above", "1e-12")
    line = error_line(train(folder, "mismatch", *options, exit_code=1))
    assert re.search(r"step 1: the log-probs .* differ by .*e-0\d nats a token .* mismatch.abort_above = 1e-12;", line)


def test_gradients_that_stay_infinite_end_the_run_in_one_line(folder):
    options = ("--run.name", "diverged", "--optimizer.lr", "1e38", "--optimizer.max_skipped_steps", "2")
    output = run(folder, "sft", "base.toml", *options, exit_code=1)
    assert [line for line in output.splitlines() if "skipped," in line] == [
        f"step {step}: optimizer step skipped, its gradients were not finite" for step in (2, 3)
    ]
    assert "norm is nan at optimizer step 3, not finite 3 times in a row" in error_line(output)


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGTERM, ONE_RANK), (signal.SIGINT, ONE_RANK), (signal.SIGUSR1, ("--rollout.engine", "megatron"))],
)
def test_signal_saves_and_exits_0(folder, number, options):
    name = f"signal-{number.name}"
    arguments = ("train", "rl.toml", "--model.path", "runs/base/hf", "--run.name", name)
    process = start(folder, *arguments, *options, "--run.steps", "2000")
    output = signal_after_step(folder, process, name, 2, number)
    assert process.returncode == 0, output[-4000:]
    last = metrics(folder, name)[-1]["step"]
    assert (folder / "runs" / name / "checkpoints" / f"step_{last}" / "manifest.json").is_file()
    assert f"stopped by a signal after step {last} of 2000" in output


def test_a_stopped_rank_ends_the_run_soon_after_the_limit_and_is_named(folder):
    limit_s = 10
    arguments = ("train", "rl.toml", "--model.path", "runs/base/hf", "--run.name", "stalled", "--run.steps", "2000")
    limits = ("--run.stall_limit_s", limit_s, "--bridge.timeout_s", "4")
    process = start(folder, *arguments, "--rollout.engine", "megatron", *limits)
    wait_for_step(folder, process, "stalled", 2)
    run_dir = folder / "runs" / "stalled"
    os.kill(json.loads((run_dir / "heartbeats" / "rank_1.json").read_text())["pid"], signal.SIGSTOP)
    stopped_at = time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert time.monotonic() - stopped_at < limit_s + 45
    assert process.returncode == 1, output[-4000:]
    line = error_line(output)
    assert line.startswith(f"error: no progress within run.stall_limit_s = {limit_s} s: rank 1 (")
    assert "stopped by a signal (SIGSTOP); 1 of 2 ranks wait for it" in line
    waiting, stopped = ((run_dir / "stall" / f"rank_{rank}.txt").read_text() for rank in (0, 1))
    assert "torch/distributed/" in waiting
    assert all("in run_training" in stacks for stacks in (waiting, stopped))


def test_stopped_sft_exports_nothing_and_exits_1(folder):
    process = start(folder, "sft", "base.toml", "--run.name", "sft-stopped", "--sft.steps", "2000")
    output = signal_after_step(folder, process, "sft-stopped", 20, signal.SIGTERM)
    assert process.returncode == 1
    assert "of 2000; no model was exported" in error_line(output)
    assert not (folder / "runs" / "sft-stopped" / "hf").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_full_disk_ends_in_one_line_and_leaves_the_earlier_checkpoint(folder, small_disk):
    options = (*ONE_RANK, "--run.dir", small_disk)
    train(folder, "full", *options, "--run.steps", "5")
    with (small_disk / "filler").open("wb") as filler:
        # Metrics and samples still fit, a checkpoint does not.
        filler.write(bytes(shutil.disk_usage(small_disk).free - 2**20))
    line = error_line(train(folder, "full", *options, exit_code=1))
    checkpoints = small_disk / "full" / "checkpoints"
    assert line.startswith(f"error: checkpoint step_10 could not be written to {checkpoints}: No space left on device")
    assert re.search(
        r"it needs about [\d.]+ MiB, [01]\.\d MiB are free; free space or set run.dir to another disk", line
    )
    assert [path.name for path in checkpoints.glob("step_*")] == ["step_5"]
    assert corrupted_files(checkpoints / "step_5", read_manifest(checkpoints / "step_5"), 0, 1) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan.toml",), "plan.toml: no such configuration file; did you mean plain.toml?"),
        (("plain.toml", "--rollout.grp_size", "2"), "did you mean rollout.group_size?"),
        (("plain.toml", "--actor.tp", "3"), "actor.tp = 3 does not divide the model's 4 attention heads; use 2"),
        (("plain.toml", "--algorithm.estimator", "grpo", "--rollout.group_size", "1"), "set it to 2 or more"),
        (("plain.toml", "--data.train", "bad.jsonl"), "bad.jsonl:2 is no JSON"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folder, arguments, message):
    (folder / "bad.jsonl").write_text('{"problem": "1 + 1", "expected_answer": "2"}\n{"problem":\n')
    options = ("--model.path", "runs/base/hf", "--rollout.engine", "megatron")
    output = run(folder, "train", *arguments, *options, exit_code=2)
    assert message in error_line(output)
    assert output.count("\n") == 1
