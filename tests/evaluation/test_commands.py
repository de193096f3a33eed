"""`riskpo evaluate` and `riskpo compare` as a user meets them: what they read, and one line with code 2 where not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_riskpo.cli import main
from megatron_riskpo.config import PromptConfig, RolloutConfig
from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluate_command import overrides_last
from megatron_riskpo.evaluation.benchmarks import Benchmark
from megatron_riskpo.evaluation.options import EvaluateConfig, load_options
from megatron_riskpo.evaluation.settings import (
    NUM_BLOCKS,
    check_settings,
    fingerprint,
    note_servers,
    settings,
    write_settings,
)
from tests.evaluation.test_nemo_skills import GOLDEN
from tests.test_cli import handlers_restored  # noqa: F401

QUESTION = '{"id": "a", "problem": "1 + 1", "expected_answer": "2"}\n'
ASKED = ("--model", "model", "--data", "q.jsonl")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """With a model folder, one without weights, a run, and question files."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "empty", "run/hf"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 512}')
    for name in ("model", "run/hf"):
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    options = {
        "data": {"strip_prefix": "Say: ", "train": "x.jsonl", "max_prompt_tokens": 32},
        "rollout": {"engine": "megatron", "max_response_tokens": 16},
        "rewards": {"answer_form": "boxed"},
        "run": {"name": "run", "steps": 3, "ranks": 2},
    }
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": options}))
    (tmp_path / "q.jsonl").write_text(QUESTION)
    return tmp_path


def test_overrides_go_behind_the_flags_of_the_command():
    given = [
        "evaluate",
        "--rewards.answer_form",
        "boxed",
        "--model",
        "m",
        "--data",
        "a",
        "b",
        "--run.ranks=2",
        "--seed",
        "1",
    ]
    assert overrides_last(given) == [
        "evaluate", "--model", "m", "--data", "a", "b", "--seed", "1", "--", "--rewards.answer_form", "boxed",
        "--run.ranks=2",
    ]  # fmt: skip
    assert overrides_last(["train", "--a.b", "1"]) == ["train", "--a.b", "1"]


def test_a_run_is_asked_as_it_was_trained(folder: Path):
    config = load_options(folder / "run", 4, ["--rollout.max_response_tokens", "20"])
    assert config.model.path == str(folder / "run" / "hf")
    assert config.data == PromptConfig(strip_prefix="Say: ", max_prompt_tokens=32)
    assert (config.rollout.engine, config.rollout.max_response_tokens) == (RolloutConfig.engine, 20)
    assert (config.rewards.answer_form, config.run.ranks, config.evaluation.num_samples) == ("boxed", 2, 4)
    assert load_options(folder / "model", 1, []).data == PromptConfig()


def test_servers_are_asked_by_one_rank_with_the_options_of_the_run(folder: Path):
    urls = ("http://a:1", "http://b:2")
    config = load_options(folder / "run", 4, ["--server.max_retries", "1"], urls)
    assert (config.rollout.server_urls, config.server.max_retries) == (urls, 1)
    assert (config.run.ranks, config.rollout.tp, config.rollout.max_response_tokens) == (0, 1, 16)
    alone = load_options(folder / "run", 4, [])
    benchmarks = {"q": Benchmark("q", [], [], [], "digest")}
    assert settings(config, benchmarks) == settings(alone, benchmarks), "an evaluation goes on with servers or without"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "an evaluation needs --model DIR and --data FILE"),
        (["--model", "model"], "an evaluation needs --model DIR and --data FILE"),
        (["--model", "model", "--data", "absent.jsonl"], "no question file absent.jsonl"),
        (["--model", "absent", "--data", "q.jsonl"], "--model = absent: no such folder"),
        (["--model", "empty", "--data", "q.jsonl"], "a model folder without weights"),
        (["--model", "model", "--data", "q.jsonl", "--num-samples", "0"], "--num-samples 0 is out of range"),
        (["--model", "model", "--data", "q.jsonl", "--rollout.group_size", "2"], "has no effect on an evaluation"),
        (
            ["--model", "model", "--data", "q.jsonl", "--rewards.answer_from", "boxed"],
            "did you mean rewards.answer_form",
        ),
        (
            ["--model", "model", "--data", "q.jsonl", "--evaluation.temperature", "0", "--num-samples", "2"],
            "same answer",
        ),
        ([*ASKED, "--rollout.tp", "2", "--rollout.expert_parallel", "true"], "but the model has no experts"),
        (
            ["--model", "model", "--data", "q.jsonl", "--server", "http://a:1", "--rollout.tp", "2"],
            "--rollout.tp has no effect with --server: it is riskpo serve's",
        ),
        (
            ["--model", "model", "--data", "q.jsonl", "--server", "http://a:1", "--server.start_timeout_s", "2"],
            "--server.start_timeout_s has no effect on an evaluation",
        ),
        (
            ["--model", "model", "--data", "q.jsonl", "--server.request_timeout_s", "2"],
            "--server.request_timeout_s has no effect without --server",
        ),
        (["--model", "model", "--data", "q.jsonl", "--server", "a:1"], "'a:1' is no address of a server"),
        (["--model", "model", "--data", "q.jsonl", "--server", "http://a:1", "http://a:1"], "names a server twice"),
        (["--model", "model", "--data", "q.jsonl", "--out", "q.jsonl"], "--out: q.jsonl is a file; name a folder"),
        (["--model", "model", "--data", "q.jsonl", "--out", "q.jsonl/a/b"], "--out: q.jsonl is a file; name a folder"),
        (["--from", "absent"], "absent: no such folder"),
        (["--from", "model"], "model has no evaluation outputs"),
        (["--from", "model", "--data", "q.jsonl"], "of the other options only --out goes with it"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments, message: str, folder: Path, capfd):
    assert main(["evaluate", *arguments]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_outputs_of_nemo_skills_are_summed_up_elsewhere(folder: Path, capsys):
    assert main(["evaluate", "--from", str(GOLDEN), "--out", str(folder / "sum")]) == 0
    shown = capsys.readouterr().out
    assert "33.3 % [" in shown
    intervals = json.loads((folder / "sum" / "intervals.json").read_text())["sums"]
    assert (intervals["num_questions"], intervals["num_samples"], intervals["errors"]) == (3, 3, 0)
    assert intervals["shares"]["pass@2"]["value"] == pytest.approx(5 / 9)
    assert intervals["shares"]["majority@3"]["value"] == pytest.approx(0.5)
    assert intervals["shares"]["truncated"]["value"] == pytest.approx(2 / 9)
    assert intervals["response_length"]["value"] == pytest.approx(38 / 3)
    assert json.loads((folder / "sum" / "metrics.json").read_text())["sums"]["pass@1"]["num_entries"] == 3


def test_metrics_of_nemo_skills_stay_as_they_are(folder: Path, capfd):
    shutil.copytree(GOLDEN, folder / "theirs")
    metrics = folder / "theirs" / "eval-results" / "metrics.json"
    before = metrics.read_text()
    assert main(["evaluate", "--from", "theirs"]) == 2
    assert "metrics.json is not riskpo's (there is no theirs/intervals.json); give --out DIR" in capfd.readouterr().err
    assert metrics.read_text() == before
    metrics.write_text("{}")
    assert main(["evaluate", "--from", "theirs", "--out", "theirs"]) == 0, "told to"
    assert json.loads(metrics.read_text())["sums"]["pass@1"]["num_entries"] == 3
    assert main(["evaluate", "--from", "theirs"]) == 0, "its own"
    assert main(["evaluate", "--from", "theirs/eval-results"]) == 0, "its own, by its inner folder"
    assert not (folder / "theirs" / "eval-results" / "intervals.json").exists()
    shutil.copytree(folder / "theirs", folder / "run" / "evaluation")
    assert main(["evaluate", "--from", "run"]) == 0, "a run's"


def test_a_benchmark_may_be_named_evaluation(folder: Path, capsys):
    for name in ("evaluation", "sums"):
        shutil.copytree(GOLDEN / "eval-results" / "sums", folder / "both" / name)
    assert main(["evaluate", "--from", "both", "--out", "sum"]) == 0
    assert set(json.loads((folder / "sum" / "intervals.json").read_text())) == {"evaluation", "sums"}


def test_a_comparison_is_printed_and_drawn(folder: Path, capsys):
    shutil.copytree(GOLDEN, folder / "b")
    (folder / "b" / "eval-results" / "sums" / "output-rs2.jsonl").unlink()
    assert main(["compare", str(GOLDEN), "b"]) == 0
    shown = capsys.readouterr().out
    assert "+16.7 [" in shown  # pass@1: 1/3 and 1/2
    assert "B better on 2, A on 0, equal 1; sign test p = 0.5" in shown
    assert "Plotly" in (folder / "comparison.html").read_text()


def test_other_questions_and_folders_are_one_line_and_code_2(folder: Path, capfd):
    shutil.copytree(GOLDEN, folder / "b")
    for path in (folder / "b").glob("eval-results/sums/*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    for arguments, message in (
        ([str(GOLDEN), "b"], "1 of A's 3 are not in B, 0 of B's 2 are not in A"),
        ([str(GOLDEN), "absent"], "absent: no such folder"),
        ([str(GOLDEN), str(GOLDEN), "--out", "no/where.html"], "is no folder; make it first"),
        ([str(GOLDEN), str(GOLDEN), "--out", "b"], "--out b is a folder; name a file in it"),
    ):
        assert main(["compare", *arguments]) == 2
        err = capfd.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.fixture
def asked(folder: Path) -> tuple[EvaluateConfig, dict[str, Benchmark]]:
    return load_options(folder / "model", 2, []), {"q": Benchmark("q", [], [], [], "digest")}


def answer_something(out: Path) -> None:
    (out / "eval-results" / "q").mkdir(parents=True, exist_ok=True)
    (out / "eval-results" / "q" / "output-rs0.jsonl").write_text("{}\n")


def test_a_call_that_was_refused_before_an_answer_binds_the_next_to_nothing(asked, folder: Path):
    config, benchmarks = asked
    other = replace(config, rewards=replace(config.rewards, answer_form="boxed"))
    write_settings(folder / "empty", settings(config, benchmarks | {"r": Benchmark("r", [], [], [], "other")}))
    check_settings(folder / "empty", settings(other, benchmarks))
    write_settings(folder / "empty", settings(other, benchmarks))
    assert json.loads((folder / "empty" / "evaluation.json").read_text())["data"] == {"q": "digest"}


def test_the_same_evaluation_goes_on_with_more_samples_files_and_ranks(asked, folder: Path):
    config, benchmarks = asked
    write_settings(folder / "out", settings(config, benchmarks))
    answer_something(folder / "out")
    more = replace(
        config, evaluation=replace(config.evaluation, num_samples=9), run=replace(config.run, ranks=4),
        rollout=replace(config.rollout, max_num_seqs=7),
    )  # fmt: skip
    further = {"r": Benchmark("r", [], [], [], "other")}
    check_settings(folder / "out", settings(more, benchmarks | further))
    write_settings(folder / "out", settings(more, further))
    assert json.loads((folder / "out" / "evaluation.json").read_text())["data"] == {"q": "digest", "r": "other"}


def test_what_servers_say_of_themselves_is_kept(asked, folder: Path):
    config, benchmarks = asked
    first, second = ({"path": f"/models/{name}", "max_model_len": 64} for name in "ab")
    write_settings(folder / "out", settings(config, benchmarks))
    note_servers(folder / "out", {"http://a:1": first})
    answer_something(folder / "out")
    check_settings(folder / "out", settings(config, benchmarks))
    write_settings(folder / "out", settings(config, benchmarks))
    note_servers(folder / "out", {"http://b:1": second})
    record = json.loads((folder / "out" / "evaluation.json").read_text())
    assert record["servers"] == {"http://a:1": first, "http://b:1": second}


def test_outputs_of_another_program_are_not_gone_on_with(asked, folder: Path):
    answer_something(folder / "out")
    with pytest.raises(UsageError, match=r"out holds outputs without evaluation.json, .*choose another --out"):
        check_settings(folder / "out", settings(*asked))


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"options": []}'])
def test_a_broken_record_is_one_line(asked, folder: Path, text: str):
    answer_something(folder / "out")
    (folder / "out" / "evaluation.json").write_text(text)
    with pytest.raises(UsageError, match=r"^out/evaluation.json is no JSON .*; remove out or choose another --out$"):
        check_settings(Path("out"), settings(*asked))


def test_another_evaluation_is_refused_by_name(asked, folder: Path):
    config, benchmarks = asked
    write_settings(folder / "out", settings(config, benchmarks))
    answer_something(folder / "out")
    other = replace(config, rewards=replace(config.rewards, answer_form="boxed"))
    with pytest.raises(UsageError, match=r"rewards.answer_form was 'any', is 'boxed'; restore that"):
        check_settings(folder / "out", settings(other, benchmarks))
    changed = {"q": Benchmark("q", [], [], [], "changed")}
    with pytest.raises(UsageError, match="the questions of q have changed"):
        check_settings(folder / "out", settings(config, changed))
    (folder / "model" / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UsageError, match="the model's files have changed"):
        check_settings(folder / "out", settings(config, benchmarks))


def test_a_large_file_is_known_by_blocks_all_over_it(tmp_path: Path):
    path = tmp_path / "big.safetensors"
    path.write_bytes(bytes(9 << 20))
    before = fingerprint(path)
    # What an optimizer step does: it changes a stretch of every tensor.
    for start in (0, (9 << 20) - 1, (9 << 20) // (NUM_BLOCKS - 1) * 5):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\x01")
        after = fingerprint(path)
        assert after != before
        before = after
