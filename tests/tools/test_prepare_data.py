"""Questions of data sets in other forms become problem and expected_answer."""

import json
from pathlib import Path

import pytest


def prepare(run_script, rows: list[dict], tmp_path: Path, *options: str) -> list[tuple[str, str]]:
    import prepare_data

    source, target = tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    run_script(prepare_data, str(source), str(target), *options)
    if not target.exists() or not target.read_text():
        return []
    return [(q["problem"], q["expected_answer"]) for q in map(json.loads, target.read_text().splitlines())]


def test_fields_within_and_doubles(run_script, tmp_path: Path) -> None:
    row = {"prompt": [{"content": "1 + 1?", "role": "user"}], "reward_model": {"ground_truth": 2}}
    other = {"prompt": [], "reward_model": {"ground_truth": "3"}}
    options = ("--problem", "prompt.0.content", "--answer", "reward_model.ground_truth", "--unique")
    assert prepare(run_script, [row, row, other], tmp_path, *options) == [("1 + 1?", "2")]


def test_answers_at_the_end_of_a_solution(run_script, tmp_path: Path) -> None:
    gsm = [{"q": "a", "a": "so 3 #### 5\n#### 1,024"}, {"q": "b", "a": "no mark"}]
    assert prepare(run_script, gsm, tmp_path, "--problem", "q", "--answer", "a", "--answer-after", "####") == [
        ("a", "1,024")
    ]
    solution = "\\boxed{1} then \\boxed{\\frac{1}{2}}."
    math = [{"q": "a", "a": solution}, {"q": "b", "a": "\\boxed{1"}, {"q": "c", "a": "none"}]
    assert prepare(run_script, math, tmp_path, "--problem", "q", "--answer", "a", "--answer-boxed") == [
        ("a", "\\frac{1}{2}")
    ]


def test_wrong_columns_and_files_are_said(run_script, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import prepare_data

    assert prepare(run_script, [{"x": 1}], tmp_path, "--problem", "q", "--answer", "a") == []
    assert "no row has q and a; look at its columns" in capsys.readouterr().err
    run_script(prepare_data, str(tmp_path / "none.jsonl"), str(tmp_path / "o"), "--problem", "q", "--answer", "a")
    assert "none.jsonl: no such file" in capsys.readouterr().err
