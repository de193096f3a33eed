"""tools/benchmark/checkpoint.py on a tiny model: what it measures, and that the way back is the model. Not tested: any
time."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_both_ways_are_measured_against_cp(tmp_path, run_script, capsys):
    import checkpoint

    options = ["--model", "tiny", "--rounds", "1", "--ranks", "1", "--folder", str(tmp_path)]
    run_script(checkpoint, *options, "--json", str(tmp_path / "figures.json"))
    report = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["way"]: row for row in report["rows"]}
    assert list(rows) == ["cp", "hf-to-megatron, 1 ranks", "megatron-to-hf, 1 ranks", "check"]
    assert len(rows["cp"]["turns"]) == 2
    for row in rows.values():
        assert row["times_cp"] == pytest.approx(row["wall"] / rows["cp"]["wall"])
        assert row["gb_per_second"] == pytest.approx(report["num_bytes"] / 1e9 / row["wall"])
    # torch alone takes more than this, and a model that this script holds is not counted.
    assert rows["check"]["peak_bytes"] > 50e6
    out = capsys.readouterr().out
    assert "- hf-to-megatron, 1 ranks: " in out
    assert "| way | s | GB/s | times cp |" in out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
