"""Which grader a question gets, and what of the question reaches it."""

import json

import pytest

from megatron_riskpo.config import RewardConfig
from megatron_riskpo.data.sources import read_source
from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.from_config import check_sources, grader_options, references_of
from megatron_riskpo.rewards.options import CodeOptions, GraderOptions
from megatron_riskpo.rewards.reference import Reference, graders_of, reference

TESTS = [{"input": "1", "output": "1"}]


def chosen(fields: dict, source: str = "sums", default: str = "math", by_source: dict | None = None) -> Reference:
    return reference("7", source, fields, default, by_source or {}, "my.jsonl:3")


def test_the_questions_own_grader_wins_then_its_sources_then_the_runs():
    by_source = {"sums": "numeric"}
    assert chosen({}).grader == "math"
    assert chosen({}, default="exact").grader == "exact"
    assert chosen({}, by_source=by_source).grader == "numeric"
    assert chosen({}, source="other", by_source=by_source).grader == "math"
    assert chosen({"grader": "choice"}, by_source=by_source).grader == "choice"


def test_a_grader_gets_the_fields_that_it_reads():
    fields = {"grader": "code", "tests": TESTS, "entry_point": "f", "tolerance": 0.1, "id": "aime25-0"}
    assert chosen(fields).fields == {"tests": TESTS, "entry_point": "f"}
    own = {key: value for key, value in fields.items() if key != "grader"}
    assert chosen(own, default="mine.py:grade").fields == own
    assert chosen(own, default="http://127.0.0.1:8000/grade").fields == own


@pytest.mark.parametrize(
    ("fields", "default", "message"),
    [
        (
            {"grader": "os:system"},
            "math",
            r"my.jsonl:3: `grader` is 'os:system', which is not built in .*rewards.graders",
        ),
        ({"grader": "http://elsewhere"}, "math", "not built in"),
        ({"grader": 3}, "math", "not built in"),
        ({}, "maths", r"unknown grader 'maths'.*math, choice"),
        ({"grader": "code"}, "math", "my.jsonl:3: the grader code needs the field `tests`"),
        ({}, "regex", "the grader regex needs the field `pattern`"),
        ({}, "reasoning_gym", "needs the field `gym_task`"),
    ],
)
def test_wrong_graders_are_usage_errors(fields: dict, default: str, message: str):
    with pytest.raises(UsageError, match=message):
        chosen(fields, default=default)


def test_from_a_file_of_mixed_sources(tmp_path):
    lines = [
        {"problem": "2+5=", "expected_answer": 7},
        {"problem": "double", "source": "programs", "grader": "code", "tests": TESTS},
        {"problem": "pick", "expected_answer": "B", "source": "quiz", "choices": ["1", "2"], "id": "q-1"},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    questions = read_source(str(path), size=0, seed=0, options={})
    assert [q.data_source for q in questions] == ["mixed", "programs", "quiz"]
    references = references_of(questions, RewardConfig(graders={"quiz": "choice"}))
    assert references == [
        Reference("7", "math", "mixed", {}),
        Reference("", "code", "programs", {"tests": TESTS}),
        Reference("B", "choice", "quiz", {"choices": ["1", "2"]}),
    ]
    assert graders_of(references) == ["math", "code", "choice"]
    check_sources(RewardConfig(graders={"quiz": "choice"}), questions)
    with pytest.raises(UsageError, match=r"'quizz', the source of no question \(there are: mixed, programs, quiz\)"):
        check_sources(RewardConfig(graders={"quiz": "choice", "quizz": "choice"}), questions)


def test_a_gym_question_brings_what_its_verifier_needs():
    (question,) = read_source("reasoning_gym:countdown", size=1, seed=1, options={})
    (own,) = references_of([question], RewardConfig(grader="reasoning_gym"))
    assert (own.source, own.fields["gym_task"]) == ("countdown", "countdown")
    assert own.fields["gym_entry"]["metadata"]["numbers"]


def test_a_source_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"problem": "p", "expected_answer": "1", "source": ["a"]}')
    with pytest.raises(UsageError, match=r"x.jsonl:1: `source` is no text"):
        read_source(str(path), size=0, seed=0, options={})


def test_options_of_the_configuration_reach_the_graders():
    config = RewardConfig(
        answer_form="tag", tolerance=0.5, timeout_s=1.0, cpu_s=2.0, memory_gib=3.0, sandbox="nemo_skills",
        sandbox_url="http://127.0.0.1:6000", test_cpu_s=4.5, test_memory_mib=100, program_timeout_s=7.0,
        partial_credit=True,
    )  # fmt: skip
    code = CodeOptions("nemo_skills", "http://127.0.0.1:6000", 4.5, 7.0, 100, True)
    assert grader_options(config) == GraderOptions("tag", 0.5, 1.0, 2.0, 3.0, code)
    assert grader_options(RewardConfig()) == GraderOptions()
