"""tools/benchmark/checkpoint_save.py on a tiny model: what is measured, how it is summed up. Not tested: any time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def test_ratios_are_to_the_save_at_once_and_to_cp() -> None:
    import checkpoint_save

    def turn(stall: float, step_after: float, until_written: float) -> dict[str, float]:
        return {"stall": stall, "step_before": 10.0, "step_after": step_after, "until_written": until_written}

    found = {
        "num_bytes": 600, "cp": [1.0, 2.0, 9.0], "cp_fsync": [3.0, 3.0, 3.0],
        "synchronous": [turn(4.0, 10.0, 4.0), turn(5.0, 10.0, 5.0), turn(6.0, 11.0, 6.0)],
        "asynchronous": [turn(1.0, 12.0, 6.0), turn(1.0, 13.0, 6.0), turn(2.0, 12.0, 7.0)],
    }  # fmt: skip
    ways = checkpoint_save.summary(found)
    assert ways["synchronous"]["lost"] == 5.0
    assert ways["synchronous"]["of_cp"] == pytest.approx((600 / 5) / (600 / 2))
    assert ways["asynchronous"]["stall_ratio"] == pytest.approx(1 / 5)
    assert ways["asynchronous"]["lost_ratio"] == pytest.approx(4 / 5)
    assert ways["asynchronous"]["of_cp_fsync"] == pytest.approx(3 / 6)


@pytest.mark.slow
def test_both_ways_save_the_same_model(tmp_path: Path, run_script: Callable[..., None], capsys) -> None:
    import checkpoint_save

    output = tmp_path / "figures.json"
    sizes = {"num-layers": 2, "hidden-size": 64, "intermediate-size": 64, "num-heads": 4, "vocab-size": 256,
             "num-sequences": 4, "median-response-tokens": 10, "max-response-tokens": 20}  # fmt: skip
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    run_script(
        checkpoint_save, "--layouts", "DP2", "--turns", "1", "--folder", str(tmp_path), "--json", str(output), *options
    )
    found = json.loads(output.read_text())["report"]["DP2"]
    # Weights, main weights and two moments, in float32.
    shapes = 256 * 64 + 2 * (64 * (64 + 64) + 64 * 64 + 128 + 3 * 64 * 64 + 2 * 64) + 64
    assert found["num_bytes"] == pytest.approx(16 * shapes, rel=0.15)
    assert [len(found[name]) for name in ("synchronous", "asynchronous", "cp", "cp_fsync")] == [1] * 4
    assert "| DP2 asynchronous |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
