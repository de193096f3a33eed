"""Runs inside the sandbox, as its first process: one fork a test, nothing kept from one to the next.

Standard library only, and no import of the project: the source is handed to the sandbox's interpreter as text. Reads
JSON lines from stdin: first the program with its limits, then cases (contract.Case, and wall_s), each answered with one
line. Being process 1 of its namespace, it gets no signal from in there but those that it has a handler for, and it
has none; all that is left of a test is killed after it. It knows no expected outputs: a program that took it over could
still not pass itself.
"""

import base64
import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_DUMPABLE = 22, 2, 4  # linux/prctl.h, linux/seccomp.h
F_ADD_SEALS, SEALS = 1033, 0xF  # linux/fcntl.h: no growing, shrinking, writing, or further seals
FD_RESULT = 3
FOLDER = "/tmp"


class _SockFprog(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interpreter's own handler would end it
    job = json.loads(sys.stdin.buffer.readline())
    job["filter"] = base64.b64decode(job["filter"])
    folder_before = os.stat(FOLDER)
    for line in sys.stdin.buffer:
        result = _run(job, json.loads(line))
        # Whoever left a file behind gets no second test in this sandbox: the next one finds none.
        result["clean"] = _is_untouched(folder_before)
        os.write(1, json.dumps(result).encode() + b"\n")


def _is_untouched(before: os.stat_result) -> bool:
    now = os.stat(FOLDER)
    try:
        return now.st_mode == before.st_mode and now.st_nlink == before.st_nlink and not os.listdir(FOLDER)
    except OSError:
        return False


def _run(job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    stdin = _sealed(case["stdin"].encode("utf-8", "surrogatepass"))
    child = os.fork()
    if child == 0:
        _child(job, case, stdin, writer)
    os.close(writer)
    os.close(stdin)
    status, output = _watch(child, reader, case["wall_s"], job["max_output"])
    os.close(reader)
    return {"status": status, "output": base64.b64encode(output).decode()}


def _sealed(content: bytes) -> int:
    """A file that can be read and nothing else."""
    file = os.memfd_create("stdin", os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    fcntl.fcntl(file, F_ADD_SEALS, SEALS)
    return file


def _watch(child: int, reader: int, wall_s: float, max_output: int) -> tuple[str, bytes]:
    """Collect the child's output until it ends, is too late, or has written too much; then nothing is left of it."""
    deadline = time.monotonic() + wall_s
    ended = os.pidfd_open(child)
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    poller.register(ended, select.POLLIN)
    os.set_blocking(reader, False)
    output, status = bytearray(), ""
    while not status:
        ready = dict(poller.poll(max(deadline - time.monotonic(), 0) * 1000))
        # Once more after the end: what was written before it is still in the pipe.
        if (reader in ready or ended in ready) and _drain(reader, output, max_output) and reader in ready:
            poller.unregister(reader)
        if len(output) > max_output:
            status = "output"
        elif ended in ready:
            status = "ended"
        elif time.monotonic() >= deadline:
            status = "timeout"
    os.close(ended)
    code = _end(child)
    if status == "ended":
        status = "timeout" if code == -signal.SIGXCPU else "ok" if code == 0 else "failed"
    return status, bytes(output[:max_output])


def _drain(reader: int, output: bytearray, limit: int) -> bool:
    """Take what is there, until there is more than `limit`. Whether nobody can write any more."""
    while len(output) <= limit:
        try:
            chunk = os.read(reader, 1 << 16)
        except BlockingIOError:
            return False
        if not chunk:
            return True
        output += chunk
    return False


def _end(child: int) -> int:
    """Kill every process but this one; the child's exit code, negative where a signal ended it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    code = 0
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)


def _child(job: dict[str, Any], case: dict[str, Any], stdin: int, writer: int) -> None:
    """Become the program's process. Does not return."""
    code = 1
    try:
        function = case["function"]
        nothing = os.open("/dev/null", os.O_RDWR)
        os.dup2(stdin, 0)
        os.dup2(nothing if function else writer, 1)
        os.dup2(nothing, 2)
        os.dup2(writer if function else nothing, FD_RESULT)
        os.closerange(FD_RESULT + 1, 1 << 16)
        _limit(job)
        sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape")
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape")
        sys.stderr = os.fdopen(2, "w")
        sys.argv = ["program"]
        code = _call(job["program"], case) if function else _execute(job["program"])
    except BaseException:
        code = 1
    finally:
        os._exit(code)


def _limit(job: dict[str, Any]) -> None:
    for signum in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_DFL)
    # A scheduler may send these to every process of the job whose run is to stop: a program would count as wrong.
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    for name, value in job["limits"].items():
        kind = getattr(resource, name)
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        # The kernel says "too long" (SIGXCPU) at the first limit, and kills at the second.
        resource.setrlimit(kind, (value, value + (name == "RLIMIT_CPU")))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    program = _SockFprog(len(job["filter"]) // 8, job["filter"])
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


def _execute(program: str) -> int:
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        sys.stdout.flush()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    return 0


def _call(program: str, case: dict[str, Any]) -> int:
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "program", "exec"), namespace)
    name, _, method = case["function"].partition(".")
    found = namespace[name]
    function = getattr(found(), method) if method else found
    value = function(*case["args"], **case["kwargs"])
    data = json.dumps(value, allow_nan=False).encode()
    while data:
        data = data[os.write(FD_RESULT, data) :]
    return 0


if __name__ == "__main__":
    serve()
