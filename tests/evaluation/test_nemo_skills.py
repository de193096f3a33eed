"""nemo-skills' files in tests/evaluation/golden, written by hand: read, summed up and written field by field.

The golden metrics.json was computed by hand: 3 questions with 3 samples each.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.nemo_metrics import nemo_metrics, question_majority_at_k, write_metrics
from megatron_riskpo.evaluation.outputs import (
    OUTPUT_FIELDS,
    append_lines,
    benchmark_folders,
    output_files,
    read_lines,
    read_partial,
)
from megatron_riskpo.evaluation.results import read_results, results_of

GOLDEN = Path(__file__).parent / "golden"
SUMS = GOLDEN / "eval-results" / "sums"


def assert_close(found, expected, place: str = "") -> None:
    """The same keys, in the same order, the same types, and numbers within rounding of the written digits."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key in expected:
            assert_close(found[key], expected[key], f"{place}/{key}")
    else:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), place


def test_golden_outputs_are_read_field_by_field():
    (results,) = read_results(GOLDEN)
    assert (results.name, results.keys, results.num_samples) == ("sums", ["sums-0", "sums-1", "sums-2"], 3)
    assert results.problems == ["2 + 2 =", "3 + 4 =", "9 - 3 ="]
    assert results.correct.tolist() == [[True, True, False], [False, True, False], [False, False, False]]
    assert results.predicted == [["4", "4", "5"], [None, "7", "8"], [None, None, "1"]]
    assert results.lengths.tolist() == [[10, 12, 14], [20, 20, 23], [5, 5, 5]]
    assert results.truncated.tolist() == [[False] * 3, [True, False, False], [True, False, False]]
    assert results.seconds == pytest.approx(7.9)
    assert not results.errors.any()


def test_golden_metrics_are_written_field_by_field(tmp_path: Path):
    shutil.copytree(GOLDEN, tmp_path / "run")
    (tmp_path / "run" / "eval-results" / "metrics.json").unlink()
    path = write_metrics(tmp_path / "run", read_results(tmp_path / "run"))
    assert path == tmp_path / "run" / "eval-results" / "metrics.json"
    assert_close(json.loads(path.read_text()), json.loads((GOLDEN / "eval-results" / "metrics.json").read_text()))


def test_golden_lines_survive_reading_and_writing(tmp_path: Path):
    for path in output_files(SUMS):
        append_lines(tmp_path / path.name, read_lines(path))
        assert (tmp_path / path.name).read_text() == path.read_text()
        assert all(tuple(line)[-len(OUTPUT_FIELDS) :] == OUTPUT_FIELDS for line in read_lines(path))


@pytest.mark.parametrize("folder", [GOLDEN, GOLDEN / "eval-results", SUMS])
def test_the_three_layouts_that_the_summarizer_takes(folder: Path):
    assert list(benchmark_folders(folder)) == ["sums"]


def test_a_greedy_output_alone_is_one_sample(tmp_path: Path):
    shutil.copy(SUMS / "output-rs0.jsonl", tmp_path / "output.jsonl")
    (results,) = read_results(tmp_path)
    assert list(nemo_metrics(results)) == ["pass@1", "pass@1[avg-of-1]"]


def test_samples_are_in_the_order_of_file_names(tmp_path: Path):
    for seed in (0, 1, 2, 10):
        shutil.copy(SUMS / "output-rs0.jsonl", tmp_path / f"output-rs{seed}.jsonl")
    (tmp_path / "output-rs0_chunk_1.jsonl").write_text("")
    assert [path.name for path in output_files(tmp_path)] == [
        f"output-rs{seed}.jsonl" for seed in ("0", "1", "10", "2")
    ]


def test_votes_are_for_text_and_verdict_and_ties_share():
    correct = np.array([[True, False, True, False], [False, False, False, False]])
    predicted = [["1", "2", "1.0", "2"], [None, None, "3", None]]
    assert question_majority_at_k(correct, predicted).tolist() == [[1, 0.5, pytest.approx(2 / 3), 0], [0, 0, 0, 0]]


def test_a_half_written_last_line_is_cut_off(tmp_path: Path):
    whole = (SUMS / "output-rs0.jsonl").read_text()
    path = tmp_path / "output-rs0.jsonl"
    path.write_text(whole + '{"id": "sums-3", "prob')
    assert len(read_partial(path)) == 3
    assert path.read_text() == whole
    assert read_partial(tmp_path / "absent.jsonl") == []


def lines() -> list[dict]:
    return read_lines(SUMS / "output-rs0.jsonl")


def without(line: dict, field: str) -> dict:
    return {key: value for key, value in line.items() if key != field}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": lines(), "b": lines()[:2]}, "a has 3 lines, b has 2: the evaluation was interrupted"),
        ({"a": lines(), "b": lines()[::-1]}, "b:1 is the question 'sums-2', a:1 is 'sums-0'"),
        ({"a": [*lines(), lines()[0]]}, "a has the question 'sums-0' 2 times"),
        ({"a": []}, "a has no line"),
        (
            {"a": [without(lines()[0], "symbolic_correct")]},
            "a:1 has no `symbolic_correct`: the response was",
        ),
        ({"a": [without(lines()[0], "predicted_answer")]}, "a:1 has no `predicted_answer`"),
        ({"a": [{**lines()[0], "symbolic_correct": 0.5}]}, "a:1: `symbolic_correct` is 0.5"),
        ({"a": [without(without(lines()[0], "id"), "problem")]}, "a:1 has neither `id` nor `problem`"),
    ],
)
def test_wrong_outputs_are_usage_errors(files, message: str):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        results_of("x", files)


def test_wrong_folders_are_usage_errors(tmp_path: Path):
    with pytest.raises(UsageError, match="no such folder"):
        read_results(tmp_path / "absent")
    with pytest.raises(UsageError, match="has no evaluation outputs"):
        read_results(tmp_path)
    (tmp_path / "output.jsonl").write_text("no JSON\n")
    with pytest.raises(UsageError, match=r"output.jsonl:1 is no JSON"):
        read_results(tmp_path)
    shutil.copy(SUMS / "output-rs0.jsonl", tmp_path)
    with pytest.raises(UsageError, match="of two evaluations"):
        read_results(tmp_path)
