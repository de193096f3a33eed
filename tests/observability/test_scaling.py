"""Runs side by side, from made-up metrics whose figures are known. Real runs: test_end_to_end."""

import json
from pathlib import Path

import pytest

from megatron_riskpo.cli import main
from megatron_riskpo.config import ActorConfig, DataConfig, ModelConfig, TrainConfig, TrainRunConfig
from megatron_riskpo.config_io import resolved, write_run_record
from megatron_riskpo.errors import UsageError
from megatron_riskpo.observability.metrics import MetricsWriter
from megatron_riskpo.observability.scaling import efficiencies, read_run, scaling_table, strong_groups, weak_groups
from megatron_riskpo.observability.scaling_report import write_scaling_report


def make_run(folder: Path, name: str, ranks: int, prompts: int, tokens_per_second: float, mfu: float | None = None,
             **actor: int) -> Path:  # fmt: skip
    """A run whose steps take a second of rollout and a second of update; every step trains the tokens that give
    `tokens_per_second` a rank over both. The first two steps are slow, one step is evaluated and saved."""
    config = TrainConfig(
        run=TrainRunConfig(name=name), model=ModelConfig(path="m"), data=DataConfig(prompts_per_step=prompts),
        actor=ActorConfig(**actor),
    )  # fmt: skip
    run_dir = folder / name
    write_run_record(config, run_dir, ranks)
    with MetricsWriter(run_dir, False) as writer:
        for step in range(1, 8):
            seconds = 50.0 if step <= 2 else 1.0
            row = {"time/rollout_s": seconds, "time/update_s": 1.0, "perf/model_tflops": 0.25}
            row["perf/update_tokens_per_second"] = 2.0 * ranks * tokens_per_second
            if mfu is not None:
                row["perf/mfu"] = mfu
            if step == 5:
                row |= {"time/evaluation_s": 30.0, "time/checkpoint_s": 9.0}
            writer.write(step, row)
    return run_dir


def test_figures_of_a_run(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, "a", 4, 32, 700.0, 0.4, tp=2))
    assert (run.name, run.ranks, run.layout, run.sequences, run.num_steps) == ("a", 4, "tp 2 dp 2", 32 * 8, 5)
    assert run.step_s == pytest.approx(2.0)
    assert run.tokens_per_second == pytest.approx(700.0)
    assert run.mfu == pytest.approx(0.4)
    assert run.phases == {"rollout": pytest.approx(0.5), "update": pytest.approx(0.5)}


def test_strong_and_weak_scaling(tmp_path: Path) -> None:
    specs = [("one", 1, 16, 1000.0), ("two_strong", 2, 16, 800.0), ("two_weak", 2, 32, 950.0), ("four", 4, 64, 900.0)]
    runs = [read_run(make_run(tmp_path, *spec)) for spec in specs]
    runs.append(read_run(make_run(tmp_path, "two_tp", 2, 16, 600.0, tp=2)))
    assert [[run.name for run in group] for group in strong_groups(runs)] == [["one", "two_strong"]]
    assert [[run.name for run in group] for group in weak_groups(runs)] == [["one", "two_weak", "four"]]
    assert efficiencies(strong_groups(runs)) == {"one": 1.0, "two_strong": pytest.approx(0.8)}
    assert efficiencies(weak_groups(runs)) == {
        "one": 1.0, "two_weak": pytest.approx(0.95), "four": pytest.approx(0.9)
    }  # fmt: skip
    lines = scaling_table(runs).splitlines()
    assert "| TFLOP/s a rank in the update |" in lines[0]
    assert lines[2] == "| one | 1 | one rank | 128 | 2 | 1000 | 0.25 | 100% | 100% | rollout 50%, update 50% |"
    assert lines[3].startswith("| two_strong | 2 | dp 2 | 128 | 2 | 800 | 0.25 | 80% |  |")
    assert lines[6].startswith("| two_tp | 2 | tp 2 | 128 | 2 | 600 | 0.25 |  |  |")


def test_the_command_prints_the_table_and_writes_the_page(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [make_run(tmp_path, "a<b>", 8, 16, 100.0, 0.41), make_run(tmp_path, "b", 16, 16, 90.0, 0.39)]
    assert main(["report", "--scaling", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    assert "| MFU of the update |" in out
    assert "| b | 16 | dp 16 | 128 | 2 | 90 | 39.0% | 90% |  | rollout 50%, update 50% |" in out
    assert out.endswith("\nscaling.html\n")
    page = (tmp_path / "scaling.html").read_text()
    assert "default-src 'none'" in page
    assert page.count("Plotly.newPlot(") >= 3
    assert "<td>a&lt;b&gt;</td>" in page
    assert "<td>90 %</td>" in page


def test_wrong_folders_are_refused_in_one_line(tmp_path: Path, capsys) -> None:
    good = make_run(tmp_path, "a", 1, 16, 100.0)
    with pytest.raises(UsageError, match="two runs have the name a"):
        write_scaling_report([good, good], tmp_path / "x.html")
    with pytest.raises(UsageError, match=r"config\.json is not readable as JSON"):
        read_run(tmp_path / "absent")
    record = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps({name: value for name, value in record.items() if name != "ranks"}))
    with pytest.raises(UsageError, match="does not say on how many ranks"):
        read_run(good)
    short = tmp_path / "short"
    short.mkdir()
    (short / "config.json").write_text(json.dumps({"ranks": 1, "config": resolved(TrainConfig())}))
    (short / "metrics.jsonl").write_text('{"step": 2, "time/update_s": 1.0}\n')
    with pytest.raises(UsageError, match="no step behind the first 2"):
        read_run(short)
    assert main(["report", str(good), str(short)]) == 2
    assert "riskpo report takes one run folder" in capsys.readouterr().err
