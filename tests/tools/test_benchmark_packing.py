"""tools/benchmark/packing.py on a small batch, and its reference planner. Not tested: any time."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "tools" / "benchmark"


def test_both_planners_are_measured_on_the_same_lengths(tmp_path: Path) -> None:
    output = tmp_path / "packing.json"
    command = [sys.executable, str(FOLDER / "packing.py"), "--sequences", "640", "--ranks", "1", "4", "--repeats", "1"]
    done = subprocess.run([*command, "--json", str(output)], capture_output=True, text=True, check=True)
    figures = json.loads(output.read_text())
    assert list(figures) == ["640 sequences, 1 ranks", "640 sequences, 4 ranks"]
    for found in figures.values():
        for results in found.values():
            before, now = results["before"], results["now"]
            assert before["least"] == now["least"] <= now["micro_batches"] <= before["micro_batches"]
            assert 0 <= now["spread"] < 0.02
            assert now["spread"] <= before["spread"] + 1e-9
            assert now["in_step"] > -1e-9
    for line in ("## 640 sequences, 4 ranks", "| lengths, model | planner |", "- median 4,000, 7B: planned in"):
        assert line in done.stdout
