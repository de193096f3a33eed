"""That the ways that tools/benchmark/logprobs.py compares give the same, and how it sums up. Not tested: any time."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.resident_pages import resident


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    import logprobs

    return logprobs


def test_the_ways_agree_on_two_ranks(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # One launch for all: that of all ways measures their memory as well, if less cleanly than alone.
    launch, reports = benchmark.on_ranks, []

    def once(num_ranks: int, task: dict[str, Any]) -> list[dict[str, Any]]:
        reports.extend([] if reports else launch(num_ranks, task))
        return reports

    monkeypatch.setattr(benchmark, "on_ranks", once)
    output = tmp_path / "figures.json"
    sizes = ["--tokens", "40", "--vocab", "600", "--hidden", "16", "--ranks", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["logprobs.py", *sizes, "--json", str(output)])
    benchmark.main()
    printed, report = capsys.readouterr().out, json.loads(output.read_text())
    assert [case["entropy"] for case in report["cases"]] == ["a metric", "in the loss"]
    for case in report["cases"]:
        assert f"2 rank(s), entropy {case['entropy']}" in printed
        assert case["differences"].keys() == {"chunked", "plain"}
        # Values, and gradients of hidden states and weights.
        assert max(case["differences"].values()) < 2e-6


def test_ratios_are_medians_of_turns(benchmark: ModuleType) -> None:
    ways = {
        "chunked": {"wall": [1.0, 9.0, 2.0], "processor": [1.0, 1.0, 3.0], "peak_bytes": 10 * 2**20},
        "usual": {"wall": [2.0, 9.0, 8.0], "processor": [1.0, 2.0, 2.0], "peak_bytes": 40 * 2**20},
    }
    case = {"ranks": 1, "entropy": "a metric", "ways": ways, "differences": {"chunked": 1e-7}}
    assert benchmark.ratios(case)["chunked"] == {"wall": 0.5, "processor": 1.0, "memory": 0.25}
    assert benchmark.case_table(case).splitlines()[2] == "| chunked | 2.00 | 1.00 | 10 | 0.50 | 1.00 | 0.25 |"


def test_peak_memory_is_what_the_body_held() -> None:
    from peak_memory import peak_memory

    with resident(2**24), peak_memory(torch.device("cpu")) as peak:
        with resident(2**26):
            pass
        with resident(2**24):
            pass
    # The kernel counts resident pages some dozens at a time.
    assert 0.97 * 2**26 < peak.bytes < 1.1 * 2**26
