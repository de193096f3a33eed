"""Sandboxes behind HTTP: SandboxFusion's and nemo-skills' servers, one request a case.

Neither keeps anything between requests of plain Python programs. A call of a function is made into a program that reads
the arguments from stdin and prints the value behind a mark.
"""

import json
import math
import secrets
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_riskpo.rewards.http_json import ServerError, post_json
from megatron_riskpo.rewards.sandbox.contract import GRACE_S, Case, CaseResult, SandboxError, wall_limit_s

MAX_OUTPUT = 1 << 20
CALLER = """

import json as _json, sys as _sys
_case = _json.loads(_sys.stdin.read())
_name, _, _method = _case["function"].partition(".")
_found = globals()[_name]
_value = (getattr(_found(), _method) if _method else _found)(*_case["args"], **_case["kwargs"])
print("\\n" + {mark!r} + _json.dumps(_value, allow_nan=False), flush=True)
"""


@dataclass(frozen=True)
class _ServerRunner:
    """A CodeRunner that asks a server once a case."""

    url: str
    cpu_s: float
    memory_mib: int

    def run(self, program: str, cases: Sequence[Case], deadline: float = math.inf) -> Generator[CaseResult, None, None]:
        """See CodeRunner."""
        for case in cases:
            yield _in_case(program, case, partial(self._request, wall_s=wall_limit_s(self.cpu_s, deadline)))

    def close(self) -> None:
        """Nothing is kept."""

    def _request(self, program: str, stdin: str, wall_s: float) -> CaseResult:
        raise NotImplementedError


class SandboxFusionRunner(_ServerRunner):
    """SandboxFusion: POST /run_code."""

    def _request(self, program: str, stdin: str, wall_s: float) -> CaseResult:
        payload = {
            "code": program, "language": "python", "stdin": stdin, "run_timeout": wall_s, "compile_timeout": wall_s,
            "memory_limit_MB": self.memory_mib, "files": {}, "fetch_files": [],
        }  # fmt: skip
        reply = _posted(self.url, "/run_code", payload, wall_s)
        run = reply.get("run_result")
        if reply.get("status") not in ("Success", "Failed") or not isinstance(run, dict):
            raise SandboxError(f"SandboxFusion failed: {reply.get('message') or reply!r:.200}")
        if run.get("status") == "TimeLimitExceeded":
            return CaseResult("timeout")
        ok = reply["status"] == "Success" and run.get("return_code") == 0
        return _capped("ok" if ok else "failed", run.get("stdout"))


class NemoSkillsRunner(_ServerRunner):
    """nemo-skills' sandbox server: POST /execute. It does not tell a program's exit code, so that a mark at the end
    of standard output says that the program came to its end. The server has a memory limit of its own."""

    def _request(self, program: str, stdin: str, wall_s: float) -> CaseResult:
        mark = secrets.token_hex(16)
        payload = {
            "generated_code": f"{program}\nprint({mark!r}, end='', flush=True)\n", "std_input": stdin,
            "timeout": wall_s, "language": "python", "max_output_characters": MAX_OUTPUT,
            "traceback_verbosity": "Plain",
        }  # fmt: skip
        reply = _posted(self.url, "/execute", payload, wall_s)
        status, stdout = reply.get("process_status"), reply.get("stdout")
        if status == "timeout":
            return CaseResult("timeout")
        if status != "completed" or not isinstance(stdout, str):
            raise SandboxError(f"the nemo-skills sandbox failed: {reply.get('stderr') or reply!r:.200}")
        if stdout.endswith("<output cut>"):
            return CaseResult("output")
        return CaseResult("ok", stdout.removesuffix(mark)) if stdout.endswith(mark) else CaseResult("failed", stdout)


def _posted(url: str, path: str, payload: dict[str, Any], wall_s: float) -> dict[str, Any]:
    try:
        return post_json(url.rstrip("/") + path, payload, wall_s + GRACE_S)
    except ServerError as error:
        raise SandboxError(str(error)) from error


def _in_case(program: str, case: Case, request: Any) -> CaseResult:
    if not case.function:
        return request(program, case.stdin)
    mark = secrets.token_hex(16)
    call = {"function": case.function, "args": case.args, "kwargs": case.kwargs}
    result = request(program + CALLER.format(mark=mark), json.dumps(call))
    _, found, value = result.output.rpartition(mark)
    if result.status != "ok":
        return CaseResult(result.status)
    return CaseResult("ok", value.strip()) if found else CaseResult("failed")


def _capped(status: Any, output: Any) -> CaseResult:
    text = output if isinstance(output, str) else ""
    return CaseResult("output") if len(text) > MAX_OUTPUT else CaseResult(status, text)
