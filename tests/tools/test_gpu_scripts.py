"""tools/gpu/*.py in their small form on the CPU: they run, and what they compare is the same. Not tested: any time, and
nothing of what differs on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "tools" / "gpu"


def run_script(name: str, *options: str, output: Path) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / name), "--small", *options, "--json", str(output)]
    # Also on a machine with a GPU.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(output.read_text())
    assert json.loads(done.stdout) == report
    return report


def test_update_is_the_same_with_and_without_recompute(tmp_path: Path) -> None:
    options = ("--recompute", "none", "full", "--steps", "2", "--warmup", "1", "--num-sequences", "6")
    report = run_script("update.py", *options, output=tmp_path / "update.json")
    assert report["workload"]["num_sequences"] == 6
    runs = report["recompute"]
    assert list(runs) == ["none", "full"]
    assert runs["none"]["actor/grad_norm"] == pytest.approx(runs["full"]["actor/grad_norm"], rel=1e-6)
    for run in runs.values():
        assert len(run["seconds"]) == 2
        assert run["ceilings"]["matrix_flops"] > 0
        assert run["ceilings"]["copy_bytes"] > 0
        flops = run["perf/model_tflops"] * 1e12
        assert run["share_of_matrix_ceiling"] == pytest.approx(flops / run["ceilings"]["matrix_flops"])
        # No peak is known of a CPU.
        assert "perf/mfu" not in run


def test_ways_to_log_probs_agree(tmp_path: Path) -> None:
    report = run_script("logprobs.py", "--repeats", "2", "--tokens", "48", output=tmp_path / "logprobs.json")
    assert report["sizes"] == {"tokens": 48, "vocab": 1024, "hidden": 32}
    assert isinstance(report["entropy a metric"].pop("liger"), str)
    for place in ("entropy a metric", "entropy in the loss"):
        assert list(report[place]) == ["plain", "fused"]
        # bfloat16 keeps 8 bits.
        assert max(report[place]["fused"]["difference_from_plain"].values()) < 2e-2


def test_a_setting_that_fails_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # tools/benchmark has a module of this name, too.
    spec = importlib.util.spec_from_file_location("gpu_update", FOLDER / "update.py")
    update = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(update)
    failing = tmp_path / "failing.py"
    failing.write_text("raise SystemExit(3)")
    monkeypatch.setattr(update, "RANK_SCRIPT", failing)
    assert "exit code 3" in update.in_a_process({})["failed"]


def test_another_process_gets_the_weights(tmp_path: Path) -> None:
    report = run_script("bridge.py", "--repeats", "2", "--bucket-mib", "0.5", output=tmp_path / "bridge.json")
    assert report["pull"]["weights_are_the_same"]
    hidden, mlp, layers, vocab, key_values = 128, 256, 2, 512, 2 * 2 * 32
    numbers = layers * (hidden * (2 * hidden + key_values + 3 * mlp + 2) + hidden + key_values) + (vocab + 1) * hidden
    assert report["pull"]["bytes"] == 2 * numbers
    for measured in (report["pull"], report["bucket_conversion"]):
        assert measured["of_copy"] > 0
