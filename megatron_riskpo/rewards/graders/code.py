"""Programs, judged by unit tests that run in a sandbox. The expected outputs never go in there."""

import json
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_riskpo.rewards.graders.text import same_json
from megatron_riskpo.rewards.options import CodeOptions
from megatron_riskpo.rewards.program_text import program_of
from megatron_riskpo.rewards.sandbox.backends import working_runner
from megatron_riskpo.rewards.sandbox.contract import Case, CaseResult

FLOAT_TOLERANCE = 1e-6


class CodeGrader:
    """1.0 if the response's program passes all of the question's `tests`, else 0.0; with partial credit the share that
    it passes. No program, and one that is not done in time, passes none of the tests that are left.

    A test is {"input", "output"} (standard input and output) or {"args", "kwargs", "expected"} (a call of the function
    that the field `entry_point` names: NAME or CLASS.METHOD; JSON values). `program_template` is a program in which
    {program} stands for the response's.
    """

    def __init__(self, options: CodeOptions) -> None:
        """Raises UsageError: without a sandbox that works there is no grader."""
        self._options = options
        self._runner = working_runner(options)

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        tests = fields["tests"]
        if not tests:
            raise ValueError("the question has no tests")
        cases = [_case(test, fields.get("entry_point")) for test in tests]
        program = program_of(response, fields.get("program_template"))
        num_passed = self._num_passed(program, cases, tests) if program is not None else 0
        return num_passed / len(tests) if self._options.partial_credit else float(num_passed == len(tests))

    def close(self) -> None:
        """End the sandboxes."""
        self._runner.close()

    def _num_passed(self, program: str, cases: Sequence[Case], tests: Sequence[Mapping[str, Any]]) -> int:
        """Stops at the first failure where one is enough to know the score; what passes too late does not count."""
        deadline = time.monotonic() + self._options.program_timeout_s
        num_passed = 0
        results = self._runner.run(program, cases, deadline)
        try:
            for test, result in zip(tests, results, strict=True):
                in_time = time.monotonic() <= deadline
                passed = in_time and is_passed(test, result)
                num_passed += passed
                if not in_time or not (passed or self._options.partial_credit):
                    break
        finally:
            results.close()
        return num_passed


def _case(test: Mapping[str, Any], entry_point: str | None) -> Case:
    """Raises ValueError, TypeError where the test has neither form."""
    if "output" in test:
        return Case(stdin=str(test.get("input", "")))
    if "expected" not in test or not entry_point:
        raise ValueError(
            "a test needs `output` (and `input`), or `expected` (and `args`, `kwargs`) with the field `entry_point`"
        )
    return Case(function=entry_point, args=list(test.get("args", ())), kwargs=dict(test.get("kwargs", {})))


def is_passed(test: Mapping[str, Any], result: CaseResult) -> bool:
    """Whether the run ended by itself with the expected value, or with the expected output: line by line and word by
    word, numbers by value."""
    if result.status != "ok":
        return False
    if "output" in test:
        return same_output(result.output, str(test["output"]))
    try:
        return same_json(json.loads(result.output), test["expected"], FLOAT_TOLERANCE)
    except (ValueError, RecursionError):
        return False


def same_output(output: str, expected: str) -> bool:
    """White space at the ends of lines and of the text does not count."""
    got, wanted = ([line.split() for line in text.strip().splitlines()] for text in (output, expected))
    return len(got) == len(wanted) and all(
        len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(got, wanted, strict=True)
    )


def _same_word(a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        return Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False
