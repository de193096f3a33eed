"""Each grader on right, wrong, missing and malformed answers. Verdicts are by hand."""

import inspect
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from reasoning_gym.factory import DATASETS

from megatron_riskpo.data.sources import read_source
from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.graders import load_grader
from megatron_riskpo.rewards.graders.gym import EVALUATING
from megatron_riskpo.rewards.http_json import ServerError
from megatron_riskpo.rewards.options import GraderOptions

ANY, BOXED = GraderOptions(), GraderOptions(answer_form="boxed")


def grade(name: str, response: str, expected: str, options: GraderOptions = ANY, **fields: object) -> float:
    return load_grader(name, options)(response, expected, fields)


@pytest.mark.parametrize(
    ("response", "expected", "score"),
    [
        ("\\boxed{B}", "B", 1),
        ("\\boxed{(B)}", "B", 1),
        ("\\boxed{b}", "B", 1),
        ("\\boxed{\\text{B}}", "B", 1),
        ("\\boxed{\\textbf{(B) } 12}", "B", 1),
        ("\\boxed{B. Paris}", "B", 1),
        ("\\boxed{C}", "B", 0),
        ("The answer is B.", "B", 1),
        ("The answer is (B)", "(B)", 1),
        ("so it must be (B)", "B", 1),
        ("A is wrong, so it is B", "B", 1),
        ("B is wrong, so it is A", "B", 0),
        ("\\boxed{A or B}", "B", 0),
        ("\\boxed{}", "B", 0),
        ("\\boxed{B", "B", 0),
        ("no idea", "B", 0),
        ("", "B", 0),
    ],
)
def test_choice(response: str, expected: str, score: float):
    assert grade("choice", response, expected) == score


def test_choice_by_the_text_of_the_option():
    choices = ["12", "15", "a cat"]
    assert grade("choice", "\\boxed{15}", "B", choices=choices) == 1
    assert grade("choice", "\\boxed{12}", "B", choices=choices) == 0
    assert grade("choice", "the answer is a cat", "C", choices=choices) == 1
    assert grade("choice", "\\boxed{B}", "15", choices=choices) == 1
    with pytest.raises(ValueError, match="no option's letter"):
        grade("choice", "\\boxed{B}", "17", choices=choices)


@pytest.mark.parametrize(
    ("name", "response", "expected", "fields", "score"),
    [
        ("exact", "\\boxed{New  York}", "New York", {}, 1),
        ("exact", "\\boxed{\\text{New York}}", "New York", {}, 1),
        ("exact", "New York", "New York", {}, 1),
        ("exact", "new york", "New York", {}, 0),
        ("exact", "I think New York", "New York", {}, 0),
        ("exact", "Answer: New York", "New York", {}, 1),
        ("exact", "", "New York", {}, 0),
        ("regex", "\\boxed{ABC-123}", "", {"pattern": "[A-Z]{3}-[0-9]+"}, 1),
        ("regex", "\\boxed{ABC-123x}", "", {"pattern": "[A-Z]{3}-[0-9]+"}, 0),
        ("regex", "ABC-1", "", {"pattern": "[A-Z]{3}-[0-9]+"}, 1),
        ("json", '{"b": [1, 2.0], "a": null}', '{"a": null, "b": [1.0, 2]}', {}, 1),
        ("json", 'so\n```json\n{"a": 1}\n```\n', '{"a": 1}', {}, 1),
        ("json", '```json\n{"a": 1}', '{"a": 1}', {}, 0),
        ("json", '{"a": true}', '{"a": 1}', {}, 0),
        ("json", '{"a": 1, "b": 2}', '{"a": 1}', {}, 0),
        ("json", "[1, 2]", "[2, 1]", {}, 0),
        ("json", '{"a": 1', '{"a": 1}', {}, 0),
        ("json", "[" * 100_000, "[]", {}, 0),
        ("json", "1" + "0" * 400, "0.5", {}, 0),
        ("json", "[1e999]", "[0.5]", {}, 0),
        ("json", "NaN", "1", {}, 0),
        ("numeric", "\\boxed{12.99}", "7.5\\sqrt{3}", {}, 1),
        ("numeric", "\\boxed{13.2}", "7.5\\sqrt{3}", {}, 0),
        ("numeric", "\\boxed{7.5\\sqrt{3}}", "12.99", {}, 1),
        ("numeric", "\\boxed{60^\\circ}", "60", {}, 1),
        ("numeric", "\\boxed{12 \\text{ cm}}", "12", {}, 1),
        ("numeric", "\\boxed{x = 12}", "12", {}, 1),
        ("numeric", "\\boxed{3.1}", "3.14159", {"tolerance": 0.02}, 1),
        ("numeric", "\\boxed{3.1}", "3.14159", {"tolerance": 0.001}, 0),
        ("numeric", "\\boxed{0.001}", "0", {}, 0),
        ("numeric", "\\boxed{0.001}", "0", {"absolute_tolerance": 0.01}, 1),
        ("numeric", "\\boxed{1,234}", "1234", {}, 1),
        ("numeric", "\\boxed{\\text{no}}", "5", {}, 0),
        ("numeric", "\\boxed{x}", "5", {}, 0),
        ("numeric", "\\boxed{\\infty}", "5", {}, 0),
        ("numeric", "\\boxed{1e400}", "5", {}, 0),
        ("numeric", "\\boxed{-12}", "12", {}, 0),
    ],
)
def test_texts_and_numbers(name: str, response: str, expected: str, fields: dict, score: float):
    assert grade(name, response, expected, **fields) == score


@pytest.mark.parametrize("name", ["math", "choice", "exact", "json", "numeric"])
def test_a_form_that_is_asked_for_is_needed(name: str):
    expected = "B" if name == "choice" else "7"
    assert grade(name, f"\\boxed{{{expected}}}", expected, BOXED) == 1
    assert grade(name, f"The answer is {expected}", expected, BOXED) == 0
    assert grade(name, f"#### {expected}", expected, BOXED) == 0
    assert grade(name, f"#### {expected}", expected, GraderOptions(answer_form="hash")) == 1
    assert grade(name, f"<answer>{expected}</answer>", expected, GraderOptions(answer_form="tag")) == 1
    assert grade(name, f"\\boxed{{{expected}}}", expected, GraderOptions(answer_form="tag")) == 0


def test_a_users_function_gets_the_fields_if_it_takes_them():
    assert grade("tests.rewards.hostile_graders:third_parameter", "r", "a", worth=0.25) == 0.25
    assert grade("tests.rewards.hostile_graders:by_request", "r", "r", worth=0.25) == 1


def test_a_users_file(tmp_path):
    (tmp_path / "mine.py").write_text("def grade(response, expected):\n    return len(response) / 10\n")
    assert grade(f"{tmp_path}/mine.py:grade", "12345", "") == 0.5
    with pytest.raises(UsageError, match="has no function 'other'"):
        grade(f"{tmp_path}/mine.py:other", "", "")


@pytest.mark.parametrize(
    "task", ["chain_sum", "countdown", "n_queens", "string_insertion", "word_sorting", "basic_arithmetic"]
)
def test_reasoning_gym_grades_its_own_answers_1_and_others_less(task: str):
    for question in read_source(f"reasoning_gym:{task}", size=5, seed=1, options={}):
        score = grade(
            "reasoning_gym", f"\\boxed{{{question.expected_answer}}}", question.expected_answer, **question.fields
        )
        assert score == 1.0
        assert grade("reasoning_gym", "\\boxed{-987654}", question.expected_answer, **question.fields) < 1.0
        assert grade("reasoning_gym", "", question.expected_answer, **question.fields) < 1.0


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("coin_flip", "1e400"),
        ("game_of_life", "{}"),
        ("prime_factorization", "9^9"),
        ("prime_factorization", "9" * 5000),
    ],
)
def test_an_answer_that_a_verifier_fails_to_read_is_wrong_and_no_error(task: str, answer: str):
    (question,) = read_source(f"reasoning_gym:{task}", size=1, seed=1, options={})
    assert grade("reasoning_gym", f"\\boxed{{{answer}}}", question.expected_answer, **question.fields) == 0.0


def test_a_verifier_that_fails_on_the_right_answer_is_an_error():
    with pytest.raises(KeyError):
        grade("reasoning_gym", "\\boxed{1}", "1", gym_task="prime_factorization", gym_entry={})


@pytest.mark.parametrize("task", EVALUATING)
def test_a_verifier_that_evaluates_never_sees_code(task: str, tmp_path):
    (question,) = read_source(f"reasoning_gym:{task}", size=1, seed=1, options={})
    owned = tmp_path / "owned"
    for code in (f"open('{owned}', 'w')", f"__import__('os').system('touch {owned}')", "[].append(1)", "print(1)"):
        for response in (code, f"\\boxed{{{code}}}"):
            assert grade("reasoning_gym", response, question.expected_answer, **question.fields) == 0.0
    assert not owned.exists()


def test_the_list_of_verifiers_that_evaluate_is_complete():
    """By reading their sources: of a new version of reasoning-gym somebody has to look at what this finds."""
    evaluates = re.compile(
        r"(?<![.\w])(?:eval|exec)\(\s*(?:answer|user_\w+|text|stripped\w*)|(?:sympy|sp)\.parse_expr\(answer|parse_expr\(answer"
    )
    found = {name for name, (cls, _) in DATASETS.items() if evaluates.search(inspect.getsource(inspect.getmodule(cls)))}
    assert found - {"propositional_logic"} == set(EVALUATING)


class ScoreHandler(BaseHTTPRequestHandler):
    """Grades by comparing; misbehaves on request."""

    def do_POST(self) -> None:
        task = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        replies = {
            "refuse": (500, b"{}"),
            "no json": (200, b"<html>"),
            "list": (200, b"[1]"),
            "text": (200, b'{"score": "1"}'),
            "error": (200, b'{"error": "out of models"}'),
            "bool": (200, b'{"score": true}'),
        }
        score = {"score": float(task["response"] == task["expected_answer"]) * task["fields"].get("worth", 1)}
        code, body = replies.get(task["response"], (200, json.dumps(score).encode()))
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), ScoreHandler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}/grade"
        made.shutdown()


def test_a_server_grades(server: str):
    assert grade(server, "a", "a") == 1.0
    assert grade(server, "a", "b") == 0.0
    assert grade(server, "a", "a", worth=-3.5) == -3.5


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("refuse", "answered 500"), ("no json", "no JSON but"), ("list", "no JSON object"), ("text", "gave no score"),
        ("error", "out of models"), ("bool", "gave no score"),
    ],
)  # fmt: skip
def test_whatever_else_a_server_says_is_an_error(server: str, response: str, reason: str):
    with pytest.raises(ServerError, match=reason):
        grade(server, response, "a")


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(ServerError, match="cannot be reached"):
        grade("http://127.0.0.1:9/grade", "a", "a")
