from pathlib import Path

import pytest

from megatron_riskpo.errors import UsageError
from megatron_riskpo.observability.metrics import MetricsWriter, read_metrics
from megatron_riskpo.observability.report import summary_table
from megatron_riskpo.observability.summary import changes, phase_seconds


def make_run(run_dir: Path, num_steps: int = 20) -> None:
    with MetricsWriter(run_dir, False) as writer:
        writer.write(0, {"eval/heldout/pass@1": 0.12, "eval/heldout/pass@10": 0.6, "eval/heldout/pass@8": 0.5})
        for step in range(1, num_steps + 1):
            times = {"time/rollout_s": 0.25, "time/update_s": 0.75} | ({"time/evaluate_s": 4.0} if step == 10 else {})
            writer.write(step, {"actor/entropy": 1.0 - step / 100, **times})
        writer.write(num_steps, {"eval/heldout/pass@1": 0.345, "eval/heldout/pass@8": 0.75})


def test_before_and_after(tmp_path: Path) -> None:
    make_run(tmp_path)
    rows = read_metrics(tmp_path)
    # pass@10 was evaluated once: no change to show. Entropy: means of steps 1-5 and 16-20.
    assert [(c.label, *c.shown()) for c in changes(rows)] == [
        ("pass@1 (heldout)", "12.0%", "34.5%", "+22.5 points"),
        ("pass@8 (heldout)", "50.0%", "75.0%", "+25.0 points"),
        ("entropy (nats)", "0.97", "0.82", "-0.15"),
    ]
    # A phase that runs now and then counts with its mean over all steps; longest first.
    assert phase_seconds(rows) == pytest.approx({"update": 0.75, "rollout": 0.25, "evaluate": 0.2})
    assert list(phase_seconds(rows)) == ["update", "rollout", "evaluate"]


def test_table_shows_the_numbers(tmp_path: Path) -> None:
    make_run(tmp_path)
    text = summary_table(tmp_path)
    for expected in ("20 steps", "pass@1 (heldout)", "34.5%", "+22.5 points", "update (s a step)", "0.75"):
        assert expected in text


def test_one_evaluation_only(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, False) as writer:
        writer.write(0, {"eval/heldout/pass@1": 0.12})
    assert "pass@1" not in summary_table(tmp_path)


def test_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="riskpo train"):
        summary_table(tmp_path)
