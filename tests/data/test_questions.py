"""Questions: the split by text, and every kind of wrong input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_riskpo.config import DataConfig
from megatron_riskpo.data.questions import is_held_out, load_questions, load_split
from megatron_riskpo.data.sources import read_source
from megatron_riskpo.errors import UsageError

SUMS = DataConfig(options={"max_terms": 3, "max_digits": 2}, train_size=300, evaluation_size=40)


def write_jsonl(path: Path, num: int, first: int = 0) -> str:
    lines = [{"problem": f"{i} + 1", "expected_answer": str(i + 1), "other": [1]} for i in range(first, first + num)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


def test_task_answers_are_right():
    for question in read_source("reasoning_gym:chain_sum", size=50, seed=1, options={"max_terms": 4}):
        expression = question.problem.split(":")[1].strip().removesuffix("=")
        tokens = expression.split()
        signs = [1, *[1 if operator == "+" else -1 for operator in tokens[1::2]]]
        total = sum(sign * int(term) for sign, term in zip(signs, tokens[::2], strict=True))
        assert total == int(question.expected_answer)


def test_the_seed_decides_and_neighbouring_seeds_share_no_sequence():
    def draw(seed: int, size: int) -> list[str]:
        options = {"min_digits": 4}
        return [q.problem for q in read_source("reasoning_gym:chain_sum", size=size, seed=seed, options=options)]

    assert draw(1, 1200) == draw(1, 1200)
    assert draw(1, 1200)[:50] == draw(1, 50)
    assert not set(draw(1, 200)) & set(draw(2, 200))
    assert len(set(draw(1, 1200))) > 1190  # the second thousand is not the first again


def test_held_out_questions_are_never_trained_on():
    training, evaluation = load_split(SUMS, 1)
    other_training, same_evaluation = load_split(SUMS, 2)
    warm_start = load_questions(SUMS.train, size=5000, seed=3, options=SUMS.options)
    held_out = {q.problem for q in evaluation}
    assert (len(training), len(evaluation), len(held_out), len(warm_start)) == (300, 40, 40, 5000)
    assert evaluation == same_evaluation
    assert training != other_training
    for questions in (training, other_training, warm_start):
        assert not held_out & {q.problem for q in questions}


def test_a_tenth_of_all_problems_is_held_out_whatever_their_blanks():
    held_out = [is_held_out(f"problem {i}") for i in range(5000)]
    assert 400 < sum(held_out) < 600
    assert held_out[:200] == [is_held_out(f" problem\n {i}  ") for i in range(200)]


def test_a_file_is_split_by_the_same_rule(tmp_path: Path):
    path = write_jsonl(tmp_path / "train.jsonl", 400)
    data = DataConfig(train=path, evaluation_size=20)
    training, evaluation = load_split(data, 1)
    assert all(is_held_out(q.problem) for q in evaluation)
    assert [q.problem for q in training] == [f"{i} + 1" for i in range(400) if not is_held_out(f"{i} + 1")]
    assert training == load_questions(path, size=3, seed=0, options={})
    assert evaluation[0].source.startswith(f"{path}:")


def test_an_evaluation_file_is_taken_out_of_the_training_questions(tmp_path: Path):
    train = write_jsonl(tmp_path / "train.jsonl", 50)
    evaluation_file = write_jsonl(tmp_path / "evaluation.jsonl", 20, first=40)
    training, evaluation = load_split(DataConfig(train=train, evaluation=evaluation_file, evaluation_size=15), 1)
    assert [q.problem for q in evaluation] == [f"{i} + 1" for i in range(40, 55)]
    assert [q.problem for q in training] == [f"{i} + 1" for i in range(40)]
    mixed = replace(SUMS, evaluation=evaluation_file, evaluation_size=20)
    assert [len(questions) for questions in load_split(mixed, 1)] == [300, 20]


@pytest.mark.filterwarnings("ignore:.*randrange:DeprecationWarning")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "reasoning_gym:chain_sm"}, "unknown reasoning_gym task 'chain_sm'; did you mean 'chain_sum'"),
        ({"options": {"max_term": 3}}, "no option 'max_term'; did you mean 'max_terms'"),
        ({"options": {"max_terms": 1}}, r"refuses its options \(max_terms = 1\): max_terms must be >= min_terms"),
        ({"options": {"max_terms": "two"}}, r"refuses its options \(max_terms = 'two'\)"),
        ({"options": {"max_terms": 3.5}}, r"refuses its options \(max_terms = 3.5\)"),
        ({"options": {"seed": 3}}, "may not set 'seed'; use run.seed"),
        (
            {"options": {"max_terms": 2, "max_digits": 1}, "evaluation_size": 50},
            r"only \d\d held-out problem\(s\) among \d+ questions, data.evaluation_size is 50",
        ),
        ({"train": "missing.jsonl", "options": {}}, "no question file missing.jsonl"),
        ({"train": "missing.jsonl", "evaluation": "missing.jsonl"}, r"no question file|data.options"),
    ],
)
def test_wrong_sources_name_what_to_change(changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        load_split(replace(SUMS, **changes), 1)


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ("not json", ":2 is no JSON"),
        ("[" * 100_000, ":2 is no JSON"),
        ("[1]", ":2 is no JSON object"),
        ('{"problem": "x"}', r":2 has no `expected_answer` \(it has: problem\)"),
        ('{"problem": "x", "expected_answer": "  "}', ":2: `expected_answer` is empty"),
        ('{"problem": "x", "expected_answer": null}', ":2: `expected_answer` is empty or no text"),
        ('{"problem": ["x"], "expected_answer": "1"}', ":2: `problem` is empty or no text"),
        ('{"problem": "x", "expected_answer": "1", "solution": 3}', ":2: `solution` is no text"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(tmp_path: Path, second_line: str, message: str):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"problem": "x", "expected_answer": 1}}\n{second_line}\n')
    with pytest.raises(UsageError, match=message) as caught:
        load_questions(str(path), size=1, seed=1, options={})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_other_wrong_files(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n")
    with pytest.raises(UsageError, match="has no question"):
        load_questions(str(path), size=1, seed=1, options={})
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_questions(str(path), size=1, seed=1, options={})
    few = write_jsonl(path, 30)
    with pytest.raises(UsageError, match=r"has only \d held-out problem\(s\) among 30 questions"):
        load_split(DataConfig(train=few, evaluation_size=20), 1)
    with pytest.raises(UsageError, match="all 30 questions"):
        load_split(DataConfig(train=few, evaluation=few, evaluation_size=30), 1)


def test_optional_fields_of_a_line(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    lines = [
        {"problem": " a ", "expected_answer": 3, "solution": "s"},
        {"problem": "b", "expected_answer": "2.50", "reference_solution": "r"},
    ]
    path.write_text("\ufeff" + "\r\n".join(map(json.dumps, lines)))
    questions = read_source(str(path), size=0, seed=0, options={})
    assert [(q.problem, q.expected_answer, q.solution) for q in questions] == [("a", "3", "s"), ("b", "2.50", "r")]
