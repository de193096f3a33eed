"""Whole runs through the command line: a base model, RL with both engines, a crash and a resume, signals, a full disk.

Second way to the final weights of a resumed run: the same run in one go. The base model is made once.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_riskpo.checkpoint.manifest import corrupted_files, read_manifest
from megatron_riskpo.sweep import read_sweep
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
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


def test_base_model_is_reused(folder):
    assert "re-using" in run(folder, "sft", "base.toml")


@pytest.mark.parametrize(("engine", "more"), [("vllm", ()), ("megatron", EVERYTHING)])
def test_killed_run_resumes_bit_for_bit(folder, engine, more):
    options = ("--rollout.engine", engine, *more)
    train(folder, f"{engine}-whole", *options)
    process = start(
        folder, "train", "rl.toml", "--model.path", "runs/base/hf", "--run.name", f"{engine}-killed", *options
    )
    signal_after_step(folder, process, f"{engine}-killed", 6, signal.SIGKILL)
    assert "resumed" in train(folder, f"{engine}-killed", *options)
    whole, resumed = (metrics(folder, f"{engine}-{kind}") for kind in ("whole", "killed"))
    assert [row["step"] for row in resumed] == list(range(11))
    assert without_times(resumed) == without_times(whole)
    expected = weights(folder, f"{engine}-whole")
    for name, tensor in weights(folder, f"{engine}-killed").items():
        assert torch.equal(tensor, expected[name]), name
    assert max(row["mismatch/logprob_abs_mean"] for row in whole[1:]) < 1e-5
    assert [row["step"] for row in whole if {"risk/q_alpha_drift", "risk/q_beta_drift"} <= row.keys()] == [
        *range(2, 11)
    ]
    assert all(row["perf/model_tflops"] > 0 and row["perf/update_tokens_per_second"] > 0 for row in whole[1:])
    if more:
        scores = {step: whole[step]["eval/heldout/pass@2"] for step in (5, 10)}
        kept = {10, max(scores, key=lambda step: (scores[step], step))}
        for kind in ("whole", "killed"):
            folders = (folder / "runs" / f"{engine}-{kind}" / "checkpoints").glob("step_*")
            assert {path.name for path in folders} == {f"step_{step}" for step in kept}
        assert {row["rollout/rounds"] for row in whole[1:]} & {2, 3}
        assert any(0 < row["rollout/kept_share"] < 1 for row in whole[1:])
        assert any(row["reward/shaped_mean"] < row["reward/mean"] for row in whole[1:])
        # The policy leaves the reference in the first step, which has two mini-batches.
        assert all(row["actor/kl_ref"] > 0 for row in whole[1:])
        assert all(row["mismatch/weight_mean"] == pytest.approx(1, abs=1e-4) for row in whole[1:])


SERVER = ("train", "rl.toml", "--model.path", "runs/base/hf", "--rollout.placement", "server")


def test_a_run_on_a_server_is_the_colocated_one_also_where_the_server_is_killed(folder):
    train(folder, "vllm-whole", "--rollout.engine", "vllm")
    process = start(folder, *SERVER, "--run.name", "served")
    wait_for_step(folder, process, "served", 3)
    os.kill(json.loads((folder / "runs" / "served" / "servers" / "server_0.json").read_text())["pid"], signal.SIGKILL)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-4000:]
    assert "rollout server given up: http://127.0.0.1:" in output
    assert "rollout server 0 is started again (2 more times at most)" in output
    whole, served = metrics(folder, "vllm-whole"), metrics(folder, "served")
    assert [row["reward/mean"] for row in served[1:]] == [row["reward/mean"] for row in whole[1:]]
    assert max(row["mismatch/logprob_abs_mean"] for row in served[1:]) < 1e-5
    assert {row["rollout/staleness_max"] for row in served[1:]} == {0.0}
    expected = weights(folder, "vllm-whole")
    for name, tensor in weights(folder, "served").items():
        # The update is the same; its rollouts may differ in the last bits, which Adam makes more of.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)
    assert list((folder / "runs" / "served" / "servers").iterdir()) == [
        folder / "runs" / "served" / "servers" / "server_0.log"
    ]


def test_a_run_one_step_ahead_resumes_with_the_questions_that_were_under_way(folder):
    options = ("--rollout.max_staleness", "1", "--mismatch.correction", "tis_sequence", "--run.name", "ahead")
    options += ("--server.transport", "network")
    process = start(folder, *SERVER, *options)
    output = signal_after_step(folder, process, "ahead", 4, signal.SIGTERM)
    assert process.returncode == 0, output[-4000:]
    stopped_at = metrics(folder, "ahead")[-1]["step"]
    checkpoint = folder / "runs" / "ahead" / "checkpoints" / f"step_{stopped_at}"
    of_ranks = [torch.load(checkpoint / f"rollouts_{rank}.pt")[str(stopped_at + 1)] for rank in range(2)]
    assert "resumed" in run(folder, *SERVER, *options)
    rows = metrics(folder, "ahead")[1:]
    assert [row["step"] for row in rows] == list(range(1, 11))
    staleness = [row["rollout/staleness_max"] for row in rows]
    # Nothing is ahead of a run's first step. The first after the resume goes on from the tokens of the checkpoint.
    assert staleness[0] == 0.0
    assert [stopped_at - min(of["versions"], default=stopped_at) for of in of_ranks] != [0, 0]
    assert set(staleness[1:]) == {1.0}
    assert all(row["bridge/received_mib"] > 0 for row in rows)
    assert all(row["mismatch/weight_mean"] == pytest.approx(1, abs=0.3) for row in rows)


def test_mismatch_beyond_the_threshold_ends_the_run_in_one_line(folder):
    options = ("--rollout.engine", "megatron", "--mismatch.abort_above", "1e-12")
    line = error_line(train(folder, "mismatch", *options, exit_code=1))
    assert re.search(r"step 1: the log-probs .* differ by .*e-0\d nats a token .* mismatch.abort_above = 1e-12;", line)


def test_rollout_logprobs_save_the_forward_pass(folder):
    options = (*ONE_RANK, "--run.steps", "2", "--actor.mini_batches", "2")
    for source in ("recompute", "rollout"):
        train(folder, source, *options, "--actor.old_logprobs", source)
    recompute, rollout = (metrics(folder, source)[1:] for source in ("recompute", "rollout"))
    assert [row["actor/old_logprobs_from_rollout"] for row in recompute + rollout] == [0, 0, 1, 1]
    assert ["time/logprobs_s" in row for row in recompute + rollout] == [True, True, False, False]
    for a, b in zip(recompute, rollout, strict=True):
        assert b["actor/loss"] == pytest.approx(a["actor/loss"], abs=1e-4)
        assert b["mismatch/logprob_abs_mean"] < 1e-5


def test_gradients_that_stay_infinite_end_the_run_in_one_line(folder):
    options = ("--run.name", "diverged", "--optimizer.lr", "1e38", "--optimizer.max_skipped_steps", "2")
    output = run(folder, "sft", "base.toml", *options, exit_code=1)
    assert [line for line in output.splitlines() if "skipped," in line] == [
        f"step {step}: optimizer step skipped, its gradients were not finite" for step in (2, 3)
    ]
    assert "norm is nan at optimizer step 3, not finite 3 times in a row" in error_line(output)


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
    limits = ("--run.stall_limit_s", limit_s, "--bridge.timeout_s", "5")
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
    assert all("in train_step" in stacks for stacks in (waiting, stopped))


def test_a_sweep_on_one_and_two_ranks_is_reported(folder):
    """The first two lines of examples/scaling/quickstart_cpu.txt: strong scaling."""
    lines = read_sweep(ROOT / "examples" / "scaling" / "quickstart_cpu.txt")[:2]
    for words in lines:
        options = ("--rollout.engine", "megatron", "--run.dir", "runs/scaling", "--run.steps", "4")
        train(folder, "named by its line", *options, *words)
    runs = [folder / "runs" / "scaling" / name for name in ("1rank", "2ranks_strong")]
    assert [json.loads((path / "config.json").read_text())["ranks"] for path in runs] == [1, 2]
    rows = run(folder, "report", "--scaling", *runs).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:4]]
    assert [row[:4] for row in cells] == [["1rank", "1", "one rank", "32"], ["2ranks_strong", "2", "dp 2", "32"]]
    assert cells[0][7] == "100%"
    assert float(cells[1][5]) / float(cells[0][5]) == pytest.approx(float(cells[1][7].rstrip("%")) / 100, abs=0.006)
    assert all("rollout" in row[9] and "update" in row[9] for row in cells)
    assert (folder / "scaling.html").is_file()


def test_stopped_sft_exports_nothing_and_exits_1(folder):
    process = start(folder, "sft", "base.toml", "--run.name", "sft-stopped", "--sft.steps", "2000")
    output = signal_after_step(folder, process, "sft-stopped", 20, signal.SIGTERM)
    assert process.returncode == 1
    assert "of 2000; no model was exported" in error_line(output)
    assert not (folder / "runs" / "sft-stopped" / "hf").exists()


def test_a_run_goes_on_under_its_own_configuration_or_accepted_changes(folder):
    """Other questions, another objective, another optimizer."""
    record = folder / "runs" / "own" / "config.json"
    train(folder, "own", *ONE_RANK, "--run.steps", "2")
    before = record.read_text()
    changes = ("--optimizer.weight_decay", "0.5", "--algorithm.beta", "0.7", "--data.train_size", "100")
    options = (*ONE_RANK, "--run.steps", "3", *changes)
    line = error_line(train(folder, "own", *options, exit_code=2))
    assert "own/checkpoints/step_2 was made with other options: data.train_size 200 -> 100, algorithm.beta" in line
    assert record.read_text() == before
    names = ("optimizer.weight_decay", "algorithm.beta", "data.train_size")
    output = train(folder, "own", *options, "--run.accept_changes", *names)
    assert "changed since then: optimizer.weight_decay 0.0 -> 0.5" in output
    assert "start anew: data position, pass rates, quantile tracker" in output
    state = json.loads((folder / "runs" / "own" / "checkpoints" / "step_3" / "state.json").read_text())
    assert state["trainer"]["stream"] == {"position": 8, "num_questions": 100, "seed": 7, "ahead": {}}
    assert state["trainer"]["objective"]["tracker"]["levels"] == [0.2, 0.7]
    # Accepted once, they are the run's options.
    before = record.read_text()
    assert "all 3 steps are done; nothing to train" in train(folder, "own", *options)
    assert record.read_text() == before


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
