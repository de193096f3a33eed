"""Whole runs through the command line: a base model, RL with both engines, a crash and a resume, an export, a sweep.

Second way to the final weights of a resumed run: the same run in one go. The base model is made once.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_riskpo.sweep import read_sweep
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import hf_token_logprobs, load_hf
from tests.whole_runs import (
    EVERYTHING,
    ONE_RANK,
    ROOT,
    error_line,
    make_folder,
    metrics,
    run,
    signal_after_step,
    start,
    train,
    wait_for_step,
    weights,
    without_times,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("runs"))


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
    assert "through files" not in output  # but through shared memory, as where servers are the run's own
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
    process = start(folder, *SERVER, *options, "--server.transport", "network")
    output = signal_after_step(folder, process, "ahead", 4, signal.SIGTERM)
    assert process.returncode == 0, output[-4000:]
    stopped_at = metrics(folder, "ahead")[-1]["step"]
    checkpoint = folder / "runs" / "ahead" / "checkpoints" / f"step_{stopped_at}"
    of_ranks = [torch.load(checkpoint / f"rollouts_{rank}.pt")[str(stopped_at + 1)] for rank in range(2)]
    output = run(folder, *SERVER, *options)  # through shared memory, as where nothing else is said
    assert "resumed" in output
    assert "through files" not in output
    rows = metrics(folder, "ahead")[1:]
    assert [row["step"] for row in rows] == list(range(1, 11))
    staleness = [row["rollout/staleness_max"] for row in rows]
    # Nothing is ahead of a run's first step. The first after the resume goes on from the tokens of the checkpoint.
    assert staleness[0] == 0.0
    assert [stopped_at - min(of["versions"], default=stopped_at) for of in of_ranks] != [0, 0]
    assert set(staleness[1:]) == {1.0}
    assert [row["step"] for row in rows if row.get("bridge/received_mib", 0) > 0] == list(range(1, stopped_at + 1))
    assert all(row["mismatch/weight_mean"] == pytest.approx(1, abs=0.3) for row in rows)


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
