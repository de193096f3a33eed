"""Published data sets, in the columns of their owners (tests/data/published, a few rows each), into question files.

Not tested: the owners' real files, which would have to be downloaded.
"""

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from megatron_riskpo.cli import main
from megatron_riskpo.config import PromptConfig
from megatron_riskpo.data.prepare.checks import Tally, apart_from, complete, distinct
from megatron_riskpo.data.prepare.code import assertions, unpickled_text
from megatron_riskpo.data.prepare.prepare import RECIPES, published_entries
from megatron_riskpo.data.prepare.recipe import Unusable
from megatron_riskpo.data.prepare.tasks import level_options
from megatron_riskpo.data.prompts import encode_prompts
from megatron_riskpo.data.questions import is_held_out
from megatron_riskpo.data.sources import read_source
from megatron_riskpo.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_riskpo.errors import UsageError

PUBLISHED = Path(__file__).parent / "published"


def decoded(value: Any) -> Any:
    """{"__bytes__": base64} stands for bytes."""
    if isinstance(value, dict):
        return (
            base64.b64decode(value["__bytes__"])
            if set(value) == {"__bytes__"}
            else {key: decoded(item) for key, item in value.items()}
        )
    return [decoded(item) for item in value] if isinstance(value, list) else value


def published(name: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / f"{name}.json").read_text())


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_lines(name: str) -> list[dict[str, Any]]:
    entries = published(name)["entries"]
    return [{"id": f"{name}-{index}", **entry, "source": name} for index, entry in enumerate(entries)]


def test_every_data_set_has_its_rows():
    assert sorted(path.stem for path in PUBLISHED.iterdir()) == sorted(RECIPES)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "geometry3k"])
def test_jsonl_files_become_question_files(name: str, tmp_path: Path):
    source = write_jsonl(tmp_path / "in.jsonl", published(name)["rows"])
    assert main(["data", "prepare", name, "--from", str(source), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert lines_of(tmp_path / "out.jsonl") == expected_lines(name)
    assert len(read_source(str(tmp_path / "out.jsonl"), size=0, seed=0, options={})) == len(expected_lines(name))


@pytest.mark.parametrize("name", RECIPES)
def test_parquet_files_become_question_files(name: str, tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        arrow.Table.from_pylist(decoded(published(name)["rows"])), tmp_path / "in.parquet"
    )
    source = str(tmp_path / "in.parquet")
    assert main(["data", "prepare", name, "--from", source, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert lines_of(tmp_path / "out.jsonl") == expected_lines(name)


def test_what_is_left_out_is_counted(tmp_path: Path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", published("olympiad_bench")["rows"])
    assert main(["data", "prepare", "olympiad_bench", "--from", str(source), "--out", str(tmp_path / "o.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"olympiad_bench: 4 rows, 1 questions in {tmp_path / 'o.jsonl'}",
        "1 left out: several answers", "1 left out: needs a figure", "1 left out: a proof, no answer",
    ]  # fmt: skip


def test_questions_of_evaluation_files_are_left_out_however_typeset(tmp_path: Path, capsys):
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"problem": "Find  x : 2X\\,=4", "expected_answer": "2"}])
    source = write_jsonl(tmp_path / "in.jsonl", published("dapo_math_17k")["rows"])
    options = ["--from", str(source), "--exclude", str(held_out), "--out", str(tmp_path / "o.jsonl")]
    assert main(["data", "prepare", "dapo_math_17k", *options]) == 0
    assert [line["problem"] for line in lines_of(tmp_path / "o.jsonl")] == ["And $y$?"]
    out = capsys.readouterr().out
    assert "1 left out: duplicate" in out
    assert "1 left out: in a file of --exclude" in out


def test_checks_say_why():
    entries = [
        {"problem": " a + 1? ", "expected_answer": "1"},
        {"problem": "$A+1$", "expected_answer": " 1 "},
        {"problem": "a - 1", "expected_answer": "2"},
        {"problem": "a - 1.", "expected_answer": "3"},
        {"problem": "b", "expected_answer": ""},
        {"problem": "c", "expected_answer": "", "tests": [{"input": "", "output": ""}]},
        {"problem": "", "expected_answer": "1"},
    ]
    tally = Tally()
    kept = apart_from(distinct(complete(entries, tally), tally), ["nothing"], tally)
    assert [entry["problem"] for entry in kept] == ["a + 1?", "c"]
    assert dict(tally.counts) == {
        "duplicate": 1, "one question with different answers": 2, "empty answer": 1, "empty problem": 1,
    }  # fmt: skip


def test_dapo_is_read_row_by_row(tmp_path: Path):
    rows = published("dapo_math_17k")["rows"]
    path = write_jsonl(tmp_path / "in.jsonl", [*rows, {"prompt": 3, "reward_model": {}}])
    entries = published_entries("dapo_math_17k", [path], None, Tally())
    assert next(entries)["problem"] == "Find $x$: $2x=4$."
    with pytest.raises(UsageError, match=r"in.jsonl:4 is not laid out as its data set is published"):
        list(entries)


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_of_more_than_a_text_is_never_run():
    assert unpickled_text(pickle.dumps("[1]")) == "[1]"
    assert unpickled_text(pickle.dumps("x" * 300, protocol=2)) == "x" * 300
    for harmful in (pickle.dumps(Harmful()), pickle.dumps(["a"]), b"\x80\x04garbage", b""):
        with pytest.raises(Unusable, match="pickle"):
            unpickled_text(harmful)


@pytest.mark.parametrize(
    "line",
    [
        "assert abs(f(1)) < 2",
        "assert f(1) == g(2)",
        "assert f({1: 2}) == 1",
        "assert f(x) == 1",
        "assert f(1) != 2",
        "x = 1",
    ],
)
def test_tests_that_cannot_be_taken_whole_are_refused(line: str):
    with pytest.raises(Unusable):
        assertions(f"assert f(0) == 0\n{line}" if "assert" in line else line, "f")


def test_a_level_sets_the_task_and_harder_ones_differ(tmp_path: Path):
    out = str(tmp_path / "o.jsonl")
    lengths = []
    for level in ("0", "3"):
        name = "reasoning_gym:chain_sum"
        assert main(["data", "prepare", name, "--level", level, "--size", "20", "--held-out", "--out", out]) == 0
        lines = lines_of(tmp_path / "o.jsonl")
        assert len({line["problem"] for line in lines}) == 20
        assert all(is_held_out(line["problem"]) and line["source"] == "chain_sum" for line in lines)
        lengths.append(sum(len(line["problem"]) for line in lines))
    assert lengths[1] > lengths[0]
    assert level_options("chain_sum", 0) != level_options("chain_sum", 3)


@pytest.mark.parametrize("template", ["{problem}", "Say: {problem}=?"])
def test_the_limit_leaves_out_what_a_run_would(template: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_sentencepiece(["1+=?", "Say: 1+1=?"], "tokenizer.model", 32)
    write_jsonl(tmp_path / "x.jsonl", [{"problem": f"{'1+' * n}1", "answer": n + 1} for n in range(10)])
    (tmp_path / "run.toml").write_text(f'[data]\nprompt_template = "{template}"\n')
    prepare = ("data", "prepare", "aime25", "--from", "x.jsonl", "--out")
    assert main([*prepare, "all.jsonl"]) == 0
    limit = ("--tokenizer", "tokenizer.model", "--max-prompt-tokens", "12")
    assert main([*prepare, "short.jsonl", *limit, "--config", "run.toml"]) == 0
    assert "bare problems" not in capsys.readouterr().out
    questions = read_source("all.jsonl", size=0, seed=0, options={})
    data = PromptConfig(prompt_template=template, max_prompt_tokens=12)
    _, kept = encode_prompts(questions, load_tokenizer("tokenizer.model"), data)
    assert 0 < len(kept) < len(questions)
    assert [line["problem"] for line in lines_of(tmp_path / "short.jsonl")] == [questions[i].problem for i in kept]
    if template == "{problem}":
        assert main([*prepare, "bare.jsonl", *limit]) == 0
        assert "counted bare problems; a run counts prompts with their template" in capsys.readouterr().out
        assert lines_of(tmp_path / "bare.jsonl") == lines_of(tmp_path / "short.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm9k"], "unknown data set 'gsm9k'"),
        (["gsm8k", "--from", "absent.jsonl"], "--from absent.jsonl: no such file"),
        (["gsm8k", "--from", "x.csv"], "--from x.csv: reads .parquet, .jsonl, .json files"),
        (["gsm8k", "--from", "wrong.jsonl"], "wrong.jsonl:1 has no column question (it has: problem, expected_answer)"),
        (["aime25", "--from", "wrong.jsonl", "--exclude", "wrong.jsonl"], "no question is left (1 left out: in a file"),
        (["aime25", "--from", "broken.json"], "broken.json is no JSON"),
        (["aime25", "--from", "wrong.jsonl", "--exclude", "none.jsonl"], "no question file none.jsonl"),
        (
            ["aime25", "--from", "wrong.jsonl", "--max-prompt-tokens", "9"],
            "--tokenizer and --max-prompt-tokens go together",
        ),
        (["aime25", "--from", "wrong.jsonl", "--config", "run.toml"], "--config says what --max-prompt-tokens counts"),
        (["reasoning_gym:chain_sam"], "unknown reasoning_gym task 'chain_sam'; did you mean 'chain_sum'?"),
        (["reasoning_gym:chain_sum", "--level", "99"], "--level 99 is none of them"),
        (["reasoning_gym:chain_sum", "--options", "max_terms"], "'max_terms' is not NAME=VALUE"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments, message: str, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "wrong.jsonl", [{"problem": "1 + 1", "expected_answer": "2"}])
    (tmp_path / "x.csv").write_text("a,b\n")
    (tmp_path / "broken.json").write_text("[{")
    assert main(["data", "prepare", *arguments, "--out", "out.jsonl"]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()
