"""Without a working sandbox no program is run; and the two servers' protocols, against servers written from their
documentation."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.graders.code import CodeGrader
from megatron_riskpo.rewards.options import CodeOptions
from megatron_riskpo.rewards.sandbox import bubblewrap, seccomp
from megatron_riskpo.rewards.sandbox.backends import code_runner, working_runner
from megatron_riskpo.rewards.sandbox.contract import Case, SandboxError
from tests.sandboxes import needs_sandbox


@needs_sandbox
def test_this_machine_has_one():
    working_runner(CodeOptions()).close()


@pytest.fixture
def uncached() -> Iterator[None]:
    caches = (bubblewrap.bwrap_path, seccomp.sandbox_filter, seccomp.program_filter, seccomp._library)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_bubblewrap_programs_are_refused(monkeypatch: pytest.MonkeyPatch, uncached: None):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        UsageError, match=r"bubblewrap \(bwrap\) is not installed; install bubblewrap and libseccomp .*apt-get"
    ):
        working_runner(CodeOptions())
    with pytest.raises(UsageError, match=r"no working sandbox"):
        CodeGrader(CodeOptions())


def test_without_libseccomp_programs_are_refused(monkeypatch: pytest.MonkeyPatch, uncached: None):
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(seccomp.ctypes, "CDLL", missing)
    with pytest.raises(UsageError, match=r"libseccomp.so.2 is not installed; install"):
        working_runner(CodeOptions())


def test_where_namespaces_are_forbidden_programs_are_refused(monkeypatch: pytest.MonkeyPatch, uncached: None, tmp_path):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(bubblewrap, "bwrap_path", lambda: str(bwrap))
    with pytest.raises(UsageError, match=r"No permissions to create new namespace|cannot be started"):
        working_runner(CodeOptions())


class Server(BaseHTTPRequestHandler):
    """Runs the (trusted) programs of these tests as the servers do, and answers in their forms."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = {"/run_code": self.sandbox_fusion, "/execute": self.nemo_skills}[self.path](request)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def sandbox_fusion(self, request: dict) -> dict:
        assert request["language"] == "python"
        if "broken server" in request["code"]:
            return {"status": "SandboxError", "message": "out of pods", "run_result": None}
        done, seconds = self.run(request["code"], request["stdin"], request["run_timeout"])
        if done is None:
            result = {
                "status": "TimeLimitExceeded",
                "execution_time": seconds,
                "return_code": None,
                "stdout": "",
                "stderr": "",
            }
            return {"status": "Failed", "message": "", "compile_result": None, "run_result": result, "files": {}}
        result = {
            "status": "Finished", "execution_time": 0.1, "return_code": done.returncode, "stdout": done.stdout,
            "stderr": done.stderr,
        }  # fmt: skip
        status = "Failed" if done.returncode else "Success"
        return {"status": status, "message": "", "compile_result": None, "run_result": result, "files": {}}

    def nemo_skills(self, request: dict) -> dict:
        assert request["language"] == "python"
        if "broken server" in request["generated_code"]:
            return {"process_status": "error", "stdout": "", "stderr": "out of workers"}
        done, _ = self.run(request["generated_code"], request["std_input"], request["timeout"])
        if done is None:
            return {"process_status": "timeout", "stdout": "", "stderr": "Execution timed out\n"}
        limit = request["max_output_characters"]
        cut = done.stdout if len(done.stdout) <= limit else done.stdout[:limit] + "<output cut>"
        return {"process_status": "completed", "stdout": cut, "stderr": done.stderr}

    @staticmethod
    def run(program: str, stdin: str, timeout_s: float) -> tuple[subprocess.CompletedProcess | None, float]:
        words = [sys.executable, "-I", "-S", "-c", program]
        try:
            return subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=timeout_s), 0.1
        except subprocess.TimeoutExpired:
            return None, timeout_s

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.mark.parametrize("backend", [pytest.param("bubblewrap", marks=needs_sandbox), "sandbox_fusion", "nemo_skills"])
@pytest.mark.parametrize(
    ("program", "case", "status", "output"),
    [
        ("print(sum(map(int, input().split())))", Case(stdin="20 22"), "ok", "42\n"),
        ("print(1)\nraise ValueError", Case(), "failed", None),
        ("print(1)\nraise SystemExit(2)", Case(), "failed", None),
        ("while True: pass", Case(), "timeout", None),
        ("print('x' * 2_000_000)", Case(), "output", None),
        ("def f(a, b=1): return {'sum': a + b}", Case(function="f", args=[2], kwargs={"b": 3}), "ok", '{"sum": 5}'),
        (
            "class A:\n    def f(self, x):\n        print('noise')\n        return [x]",
            Case(function="A.f", args=["é"]),
            "ok",
            None,
        ),
        ("def f(): raise KeyError", Case(function="f"), "failed", None),
        ("x = 1", Case(function="f"), "failed", None),
    ],
)
def test_all_backends_say_the_same(url: str, backend: str, program: str, case: Case, status: str, output: str | None):
    runner = code_runner(CodeOptions(backend=backend, url=url, test_cpu_s=0.5))
    (result,) = runner.run(program, [case])
    runner.close()
    assert result.status == status
    if output is not None:
        assert result.output == output
    elif case.function == "A.f":
        assert json.loads(result.output) == ["é"]


@pytest.mark.parametrize("backend", [pytest.param("bubblewrap", marks=needs_sandbox), "sandbox_fusion", "nemo_skills"])
def test_what_runs_at_the_deadline_is_a_timeout(url: str, backend: str):
    """By itself a test may take 16 s."""
    runner = code_runner(CodeOptions(backend=backend, url=url))
    start = time.monotonic()
    results = list(runner.run("import time\ntime.sleep(12)", [Case(), Case()], start + 0.3))
    runner.close()
    assert [result.status for result in results] == ["timeout", "timeout"]
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("backend", ["sandbox_fusion", "nemo_skills"])
def test_a_servers_failure_is_not_the_programs(url: str, backend: str):
    runner = code_runner(CodeOptions(backend=backend, url=url))
    with pytest.raises(SandboxError, match="out of"):
        list(runner.run("# broken server", [Case()]))
    working_runner(CodeOptions(backend=backend, url=url))
    with pytest.raises(UsageError, match=f"no working sandbox \\({backend}\\): .*cannot be reached"):
        working_runner(CodeOptions(backend=backend, url="http://127.0.0.1:9"))
