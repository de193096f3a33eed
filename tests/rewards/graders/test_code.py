"""Programs judged by tests in the sandbox; outputs are compared outside."""

import time
from collections.abc import Iterator

import pytest

from megatron_riskpo.rewards.graders.code import CodeGrader, same_output
from megatron_riskpo.rewards.options import CodeOptions, GraderOptions
from megatron_riskpo.rewards.pool import Grade, GraderPool
from megatron_riskpo.rewards.program_text import program_of
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rewards.sandbox.contract import CaseResult
from tests.sandboxes import needs_sandbox

pytestmark = needs_sandbox

SQUARES = {"tests": [{"input": f"{n}\n", "output": f"{n * n}\n"} for n in (0, 3, -4, 12)]}
CALLS = {
    "entry_point": "f",
    "tests": [{"args": [1, 2], "expected": [3, 1.5]}, {"args": [5], "kwargs": {"b": 5}, "expected": [10, 5.0]}],
}


@pytest.fixture(scope="module")
def grader() -> Iterator[CodeGrader]:
    made = CodeGrader(CodeOptions(test_cpu_s=1.0))
    yield made
    made.close()


@pytest.fixture(scope="module")
def partial() -> Iterator[CodeGrader]:
    made = CodeGrader(CodeOptions(test_cpu_s=1.0, partial_credit=True))
    yield made
    made.close()


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nIt squares."


@pytest.mark.parametrize(
    ("program", "score", "share"),
    [
        ("print(int(input()) ** 2)", 1, 1),
        ("n = int(input())\nprint(n * n, end='  \\n\\n')", 1, 1),
        ("print(float(input()) ** 2)", 1, 1),
        ("print(abs(int(input())) * 3)", 0, 0.5),
        ("n = int(input())\nassert n >= 0\nprint(n * n)", 0, 0.75),
        ("print('the square is', int(input()) ** 2)", 0, 0),
        ("print(int(input()) ** 2)\nraise SystemExit(1)", 0, 0),
        ("import os\nprint(int(input()) ** 2, flush=True)\nos._exit(0)", 1, 1),
        ("n = int(input())\nwhile n > 3: pass\nprint(n * n)", 0, 0.75),
        ("print(0)", 0, 0.25),
        ("this is no program", 0, 0),
        ("", 0, 0),
    ],
)
def test_standard_input_and_output(grader, partial, program: str, score: float, share: float):
    assert grader(fenced(program), "", SQUARES) == score
    assert partial(fenced(program), "", SQUARES) == share


@pytest.mark.parametrize(
    ("program", "score", "share"),
    [
        ("def f(a, b):\n    return [a + b, (a + b) / 2]", 1, 1),
        ("def f(a, b):\n    print('noise')\n    return (a + b, (a + b) / 2)", 1, 1),
        ("def f(a, b):\n    return [a + b, 1.5]", 0, 0.5),
        ("def g(a, b):\n    return [a + b, (a + b) / 2]", 0, 0),
        ("def f(a, b):\n    return {a + b, 1}", 0, 0),
        ("def f(a, b):\n    return float('nan')", 0, 0),
        ("class Any(list):\n    def __eq__(self, other): return True\ndef f(a, b): return Any()", 0, 0),
        ("import os\ndef f(a, b):\n    os.write(3, b'[3, 1.5]')\n    os._exit(0)", 0, 0.5),
        ("import os\ndef f(a, b):\n    os.write(3, b'[1e999, 1e999]')\n    os._exit(0)", 0, 0),
        ("def f(a, b):\n    return [a + b, 10**400]", 0, 0),
        ("def f(a, b):\n    raise SystemExit(0)", 0, 0),
        ("f = 3", 0, 0),
    ],
)
def test_calls(grader, partial, program: str, score: float, share: float):
    assert grader(fenced(program), "", CALLS) == score
    assert partial(fenced(program), "", CALLS) == share


def test_a_method_and_a_template(grader):
    fields = {"entry_point": "Solution.double", "tests": [{"args": ["ab"], "expected": "abab"}]}
    assert grader("```python\nclass Solution:\n    def double(self, s): return s * 2\n```", "", fields) == 1
    fields = {
        "entry_point": "f",
        "program_template": "def f(x):\n    return {program}",
        "tests": [{"args": [4], "expected": 9}],
    }
    assert grader("2*x+1", "", fields) == 1
    assert grader("2x+1", "", fields) == 0


def test_state_does_not_go_from_test_to_test_nor_from_program_to_program(grader):
    counts = (
        "import builtins, os, sys\nn = getattr(builtins, 'seen', 0) + len(os.listdir('/tmp'))\nbuiltins.seen = n + 1\n"
        "open('/tmp/mark', 'w').write('x')\nprint(n)"
    )
    fields = {"tests": [{"input": "", "output": "0"}] * 3}
    assert grader(fenced(counts), "", fields) == 1
    assert grader(fenced(counts), "", fields) == 1
    poison = "import json\njson.dumps = lambda *a, **k: '42'\nimport sys\nsys.modules['math'] = None\nprint(1)"
    assert grader(fenced(poison), "", {"tests": [{"output": "1"}]}) == 1
    clean = "import json, math\nprint(json.dumps(math.floor(2.5)))"
    assert grader(fenced(clean), "", {"tests": [{"output": "2"}]}) == 1


def test_all_tests_of_a_program_share_a_limit():
    grader = CodeGrader(CodeOptions(test_cpu_s=5.0, program_timeout_s=1.0, partial_credit=True))
    start = time.monotonic()
    fields = {"tests": [{"output": "1"}] * 50}
    share = grader(fenced("import time\ntime.sleep(0.3)\nprint(1)"), "", fields)
    grader.close()
    assert share <= 0.06, "three tests take 0.9 s"
    assert time.monotonic() - start < 15


def test_a_slow_program_is_wrong_and_no_error():
    """One test alone may take 16 s; the pool would kill the worker after 11."""
    code = CodeOptions(program_timeout_s=1.0)
    slow = Reference("", "code", fields={"tests": [{"output": "1"}]})
    with GraderPool(["code"], 1, GraderOptions(code=code)) as pool:
        assert pool.score([fenced("import time\ntime.sleep(14.8)\nprint(1)")], [slow]) == [Grade(0.0)]
        assert pool.num_restarts == 0


def test_what_passes_too_late_does_not_count(partial, monkeypatch: pytest.MonkeyPatch):
    """A server may keep no time-out of ours."""

    def late(program: str, cases: list, deadline: float) -> Iterator[CaseResult]:
        yield CaseResult("ok", "0")
        time.sleep(max(deadline - time.monotonic(), 0) + 0.01)
        yield from [CaseResult("ok", "9"), CaseResult("ok", "16"), CaseResult("ok", "144")]

    monkeypatch.setattr(partial._runner, "run", late)
    monkeypatch.setattr(partial, "_options", CodeOptions(program_timeout_s=0.3, partial_credit=True))
    assert partial(fenced("print(int(input()) ** 2)"), "", SQUARES) == 0.25


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tests": []}, "no tests"),
        ({"tests": [{"input": "1"}]}, "a test needs `output`"),
        ({"tests": [{"args": [1], "expected": 1}]}, "`entry_point`"),
    ],
)
def test_a_question_that_cannot_be_tested_is_an_error_and_no_wrong_answer(grader, fields: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        grader(fenced("print(1)"), "", fields)


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("~~~py\nprint(1)\n~~~", "print(1)\n"),
        ("```python\nprint(1)\n```\nor better\n```python\nprint(2)\n```", "print(2)\n"),
        ("```python\nprint(1)\n```\nor better\n```python\nprint(2", None),
        ("```python\nprint(1)", None),
        ("````\n```\nx\n```\n````", "```\nx\n```\n"),
        ("", None),
        ("  \n", None),
        ("```\n```", None),
    ],
)
def test_the_program_in_a_response(response: str, program: str | None):
    assert program_of(response) == program


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3\n\n", "1 2\n3", True),
        ("1 2 3", "1 2\n3", False),
        ("1.0", "1", True),
        ("1e3", "1000", True),
        ("0.1", "0.10000001", False),
        ("nan", "1", False),
        ("Yes", "yes", False),
        ("", "", True),
        ("", "1", False),
    ],
)
def test_outputs_are_compared_word_by_word(output: str, expected: str, same: bool):
    assert same_output(output, expected) is same
