"""What tools/benchmark/advantages.py times, and how it sums up. Not tested: any time."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_riskpo.algorithms.advantages import ESTIMATORS, validate_algorithm


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    import advantages

    return advantages


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    import advantage_cases

    return advantage_cases


def cells(table: str) -> list[list[str]]:
    """Header and rows of a Markdown table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_every_estimator_is_timed_with_options_it_takes(cases: ModuleType) -> None:
    found = cases.all_cases()
    assert {case.config.estimator for case in found} == set(ESTIMATORS)
    labels = [case.label for case in found]
    assert len(set(labels)) == len(labels)
    for case in found:
        for shape in ((8192, 5), (4096, 10)):
            validate_algorithm(case.config, *shape)
    riskpo = {
        (case.config.pairing, case.config.bundling, case.config.quantile_source)
        for case in found
        if case.config.estimator == "riskpo"
    }
    assert len(riskpo) == 2 * 3 * 3
    continuous = [case for case in found if case.rewards == "continuous"]
    assert {(case.config.pairing, case.config.bundling) for case in continuous} == {
        ("complete", bundling) for bundling in ("random", "sorted", "self")
    }


def test_goals_are_lower_with_complete_pairing(cases: ModuleType) -> None:
    assert all(case.goal == (100 if case.config.pairing == "complete" else 300) for case in cases.all_cases())


def test_rewards_are_of_mixed_difficulty(cases: ModuleType) -> None:
    batch = cases.Batch.draw(2000, 10)
    assert set(batch.binary.unique().tolist()) == {0.0, 1.0}
    # Beta-binomial with uniform pass rates: each number of right answers is as likely as any other.
    counts = torch.bincount(batch.binary.sum(dim=1).long(), minlength=11).double()
    expected = 2000 / 11
    assert float(((counts - expected).square() / expected).sum()) < 30  # chi-square, 10 degrees of freedom: p = 0.001
    assert len(batch.continuous.unique()) == batch.continuous.numel()
    # An earlier step's pass rate says something of this one's, and is not this one's.
    together = torch.corrcoef(torch.stack([batch.pass_rates, batch.binary.mean(dim=1)]))
    assert 0.7 < float(together[0, 1]) < 0.95


def test_the_loop_does_what_riskpo_reference_does(benchmark: ModuleType, cases: ModuleType) -> None:
    assert benchmark.largest_difference(cases.Batch.draw(20, 6)) < 1e-9


def test_ratios_divide_medians_and_best_runs(benchmark: ModuleType, cases: ModuleType) -> None:
    by_label = {case.label: case for case in cases.all_cases()}
    loops = {
        "sum_mean": benchmark.Timing(processor=[3.0, 2.0, 100.0], wall=[1.0] * 3),
        "std": benchmark.Timing(processor=[12.0], wall=[1.0]),
    }

    def times(label: str, *whole: float) -> object:
        alone = benchmark.Timing([0.001, 0.004, 0.002], [9.0] * 3)
        return benchmark.CaseTimes(by_label[label], alone, benchmark.Timing(list(whole), [9.0] * 3))

    grpo = times("grpo", 0.01, 0.01, 0.01)
    paired = times("riskpo complete random global", 0.02, 0.01, 0.03)
    # Compared with the loop of its own credit mode.
    reference = times("riskpo_reference std", 0.06, 0.04, 0.05)
    assert benchmark.ratios(paired, loops) == pytest.approx({"alone": 1500, "whole": 150, "whole_best": 200})
    assert benchmark.ratios(reference, loops) == pytest.approx({"alone": 6000, "whole": 240, "whole_best": 300})
    header, *rows = cells(benchmark.shape_table(loops, [grpo, paired, reference]))
    assert all(len(row) == len(header) for row in rows)
    assert rows[0] == ["grpo", "2.00", "1.00", "10.00", "10.00", "1,500", "300", "200", "300", "met"]
    assert rows[1][3:] == ["20.00", "10.00", "1,500", "150", "200", "100", "met"]
    assert rows[2][5:] == ["6,000", "240", "300", "300", "missed"]


def test_growth_is_told_an_answer(benchmark: ModuleType) -> None:
    case = benchmark.COMMON_CASES[0]
    timing = benchmark.Timing([0.002, 0.001, 0.003], [1.0] * 3)
    double = benchmark.Timing([0.004], [1.0])
    table = benchmark.growth_table({1000: [benchmark.CaseTimes(case, timing, double)]})
    assert cells(table)[1] == [case.label, "1,000", "2.00", "4.00", "4.00", "2000", "4000"]


def test_a_small_run_prints_all_tables_and_writes_all_times(
    benchmark: ModuleType,
    cases: ModuleType,
    tmp_path: Path,
    run_script: Callable[..., None],
    capsys: pytest.CaptureFixture,
) -> None:
    output = tmp_path / "times.json"
    arguments = ["--shapes", "12x5", "--sizes", "50", "100", "--rounds", "3", "--repeats", "2"]
    run_script(benchmark, *arguments, "--json", str(output))
    printed, report = capsys.readouterr().out, json.loads(output.read_text())
    labels = [case.label for case in cases.all_cases()]
    of_shape = report["shapes"]["12x5"]
    assert [times["case"]["label"] for times in of_shape["cases"]] == labels
    assert all(f"| {label} |" in printed for label in labels)
    assert [len(loop["processor"]) for loop in of_shape["loops"].values()] == [3] * 4
    times = of_shape["cases"][0]
    assert len(times["whole"]["processor"]) == len(times["whole"]["wall"]) == 3 * 2
    assert all(math.isfinite(ratio) for case in of_shape["cases"] for ratio in case["ratios"].values())
    assert [len(timings) for timings in of_shape["parts"].values()] == [6] * len(benchmark.COMMON_CASES)
    assert list(report["growth"]) == ["50", "100"]
    assert [times["case"]["label"] for times in report["growth"]["50"]] == [c.label for c in benchmark.COMMON_CASES]
