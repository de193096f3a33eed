"""tools/benchmark/update.py on a tiny model: layouts and ways compute the same gradient. Not tested: any time."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def workload() -> ModuleType:
    import update_workload

    return update_workload


def test_every_row_trains_on_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import update

    output = tmp_path / "figures.json"
    sizes = {
        "num-sequences": 8, "hidden-size": 32, "intermediate-size": 64, "vocab-size": 256,
        "median-response-tokens": 10, "max-response-tokens": 40, "micro-batch-tokens": 128,
    }  # fmt: skip
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    # Each has a plan of its own; TP2 and PP2 have that of TP1.
    options += ["--layouts", "DP2", "CP2", "PP2 VP2"]
    monkeypatch.setattr(sys, "argv", ["update.py", "--rounds", "1", "--repeats", "1", *options, "--json", str(output)])
    update.main()
    printed, report = capsys.readouterr().out, json.loads(output.read_text())
    assert [(row["layout"], row["way"]) for row in report["rows"]] == [
        (layout, way) for layout in ("TP1", "DP2", "CP2", "PP2 VP2") for way in ("packed", "padded", "padded, sorted")
    ]
    # The dummies leave the loss and its denominator, and no real token attends to them.
    assert report["norm_difference"] < 2e-6
    for row in report["rows"]:
        assert len(row["wall"]) == 1
        assert (row["tokens"] == report["real_tokens"]) == (row["way"] == "packed")
        assert f"| {row['layout']} {row['way']} |" in printed


def test_rectangles_keep_the_budget_and_the_order(workload: ModuleType) -> None:
    lengths = [5, 9, 2, 2, 2, 30, 4]
    bins = workload.padded_micro_batches(lengths, range(7), max_tokens=20, multiple_of=1)
    # The third sequence would make 3 x 9 tokens; the sixth is over the budget by itself.
    assert bins == [[0, 1], [2, 3, 4], [5], [6]]
    in_threes = workload.padded_micro_batches(lengths, range(7), max_tokens=20, multiple_of=3)
    assert len(in_threes) == 6
    assert [row for rows in in_threes for row in rows] == list(range(7))


def test_padding_comes_after_the_response_and_is_masked(workload: ModuleType) -> None:
    rollouts = workload.make_rollouts(workload.Workload(num_sequences=3))
    longer, keep = workload.pad_to_longest(rollouts, [[0, 2], [1]])
    longest = max(int(rollouts.lengths[row]) for row in (0, 2))
    assert longer.lengths.tolist() == [longest, int(rollouts.lengths[1]), longest]
    masks = longer.split_by_response(keep)
    for before, after, mask in zip(rollouts.responses(), longer.responses(), masks, strict=True):
        assert after[mask].equal(before)
        assert not after[~mask].any()
        assert mask[: before.numel()].all()


def test_ranks_share_the_clock_and_add_up_their_work() -> None:
    import update

    def rank(wall: float, processor: float) -> dict:
        turn = {"wall": wall, "processor": processor, "grad_norm": 2.0}
        found = {"tokens": 200, "micro_batches": 2, "turns": [turn]}
        return {"TP2": {"packed": found}}

    rows: update.Rows = {}
    update.add_round(rows, [rank(4.0, 3.0), rank(4.0, 2.0)])
    update.add_round(rows, [rank(2.0, 3.0), rank(2.0, 2.0)])
    update.add_round(rows, [rank(9.0, 3.0), rank(9.0, 2.0)])
    speed = update.speeds(rows, real_tokens=100)["TP2", "packed"]
    assert speed == {
        "per_second": 25.0, "fastest": 50.0, "per_core": 12.5, "per_processor_second": 20.0, "padding": 0.5
    }  # fmt: skip
