"""Programs, with their tests as the code grader takes them: {"input", "output"}, or {"args", "expected"} of a call."""

import ast
import base64
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

from megatron_riskpo.data.prepare.recipe import Entry, Recipe, Unusable

MAX_TEST_BYTES = 64 << 20
"""Of one question's tests, unpacked."""
READ_STDIN = "Write a Python program that reads the input from standard input and writes the output to standard output."


def live_code_bench(row: Mapping[str, Any]) -> Entry:
    """Public and private tests; tasks with starter code call a method, the others read standard input."""
    tests = json.loads(row["public_test_cases"]) + _private_tests(row.get("private_test_cases"))
    if not tests:
        raise Unusable("no tests")
    problem = str(row["question_content"]).strip()
    common = {"expected_answer": "", "grader": "code", "difficulty": row.get("difficulty")}
    if not str(row.get("starter_code") or "").strip():
        cases = [{"input": test["input"], "output": test["output"]} for test in tests]
        return {"problem": f"{problem}\n\n{READ_STDIN}", **common, "tests": cases}
    name = json.loads(row.get("metadata") or "{}").get("func_name")
    if not name:
        raise Unusable("no function name")
    starter = str(row["starter_code"]).rstrip()
    asked = f"{problem}\n\nComplete this Python program:\n```python\n{starter}\n```"
    entry_point = f"Solution.{name}" if "class Solution" in starter else name
    return {"problem": asked, **common, "entry_point": entry_point, "tests": [_call(test) for test in tests]}


def human_eval(row: Mapping[str, Any]) -> Entry:
    """The assertions of `check` that compare a call with a literal become tests; the expected values then stay outside
    the sandbox."""
    tests = assertions(str(row["test"]), "candidate")
    problem = f"Complete this Python function:\n```python\n{str(row['prompt']).rstrip()}\n```"
    return {
        "problem": problem, "expected_answer": "", "grader": "code", "entry_point": row["entry_point"], "tests": tests,
        "reference_solution": f"{row['prompt']}{row.get('canonical_solution') or ''}",
    }  # fmt: skip


def mbpp(row: Mapping[str, Any]) -> Entry:
    """The text names no function: one test is shown, as in the data set's paper."""
    lines = [str(line) for line in row["test_list"]]
    name = _called(lines[0]) if lines else None
    if name is None:
        raise Unusable("no test that calls a function")
    text = str(row.get("text") or row.get("prompt")).strip()
    return {
        "problem": f"{text}\nYour code should pass this test:\n```python\n{lines[0]}\n```", "expected_answer": "",
        "grader": "code", "entry_point": name, "tests": assertions("\n".join(lines), name),
        "reference_solution": row.get("code") or "",
    }  # fmt: skip


def assertions(source: str, name: str) -> list[dict[str, Any]]:
    """The tests {"args", "kwargs", "expected"} of a program's `assert name(...) == value` with JSON values.

    Raises Unusable where an assertion has another form: a part of the tests would let wrong programs pass.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        # HumanEval's "assert True, ..." tests nothing.
        if isinstance(node, ast.Assert) and not (isinstance(node.test, ast.Constant) and node.test.value is True):
            found.append(_test_of(node.test, name))
    if not found:
        raise Unusable("no assertions")
    return found


def unpickled_text(data: bytes) -> str:
    """The one text in a pickle, without running it: what it would do is only looked at. Raises Unusable."""
    # An opcode's argument is bytes, text, a number or None; only a text and what stores it may be there.
    allowed = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
    texts = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"):
                texts.append(argument)
            elif opcode.name not in allowed:
                raise Unusable("tests in a pickle that is more than a text")
    except ValueError as error:
        raise Unusable("tests in a broken pickle") from error
    if len(texts) != 1:
        raise Unusable("tests in a pickle that is more than a text")
    return str(texts[0])


def _private_tests(value: str | None) -> list[dict[str, Any]]:
    """JSON, or base64 of zlib of a pickle of JSON."""
    if not value:
        return []
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(value), MAX_TEST_BYTES)
    except (ValueError, zlib.error) as error:
        raise Unusable("private tests that cannot be unpacked") from error
    if unpacker.unconsumed_tail:
        raise Unusable(f"tests of more than {MAX_TEST_BYTES >> 20} MiB")
    return json.loads(unpickled_text(data))


def _call(test: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments stand one a line, in JSON."""
    arguments = [json.loads(line) for line in str(test["input"]).split("\n") if line.strip()]
    return {"args": arguments, "expected": json.loads(test["output"])}


def _called(line: str) -> str | None:
    """The name of the function that an assertion calls."""
    try:
        calls = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
    except SyntaxError:
        return None
    names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    return names[0] if names else None


def _test_of(test: ast.expr, name: str) -> dict[str, Any]:
    """One comparison with ==, or a bare call (expected True), or `not` of one (expected False)."""
    expected: Any = True
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, expected = test.operand, False
    elif isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq | ast.Is) and len(test.ops) == 1:
        test, expected = test.left, _literal(test.comparators[0])
    if not (isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == name):
        raise Unusable("assertions that are no comparison of a call with a value")
    kwargs = {str(keyword.arg): _literal(keyword.value) for keyword in test.keywords}
    return {"args": [_literal(argument) for argument in test.args], "kwargs": kwargs, "expected": expected}


def _literal(node: ast.expr) -> Any:
    """A JSON value (tuples become lists, as the call's result does on its way out of the sandbox)."""
    try:
        value = ast.literal_eval(node)
        return json.loads(json.dumps(value, allow_nan=False)) if not _has_other_keys(value) else _no_json()
    except (ValueError, TypeError) as error:
        raise Unusable("assertions with values that have no JSON form") from error


def _has_other_keys(value: Any) -> bool:
    """Whether a dict in it has keys that JSON would turn into texts."""
    if isinstance(value, dict):
        return any(not isinstance(key, str) or _has_other_keys(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(map(_has_other_keys, value))


def _no_json() -> Any:
    raise ValueError


RECIPES: dict[str, Recipe] = {
    "livecodebench": Recipe(
        live_code_bench, (("question_content",), ("public_test_cases",)),
        ("livecodebench/code_generation_lite", (None,), "test"), ("question_id", "platform", "contest_date"),
    ),
    "humaneval": Recipe(
        human_eval, (("prompt",), ("test",), ("entry_point",)), ("openai/openai_humaneval", (None,), "test"),
        ("task_id",),
    ),
    "mbpp": Recipe(mbpp, (("text", "prompt"), ("test_list",)), ("google-research-datasets/mbpp", ("full",), "test"),
                   ("task_id",)),
}  # fmt: skip
