"""The end of a command's process: exit functions and output, then out, whatever threads there are."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from megatron_riskpo.distributed.leave import leave
atexit.register(print, "exit function")
threading.Thread(target=time.sleep, args=(600,)).start()
sys.stdout.write("not flushed;")
leave({code})
"""


@pytest.mark.parametrize("code", [0, 2])
def test_output_is_written_and_a_living_thread_does_not_matter(code):
    command = [sys.executable, "-c", PROGRAM.format(code=code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "not flushed;exit function\n", "")


def test_closed_pipe_is_a_failure_without_a_traceback():
    command = [sys.executable, "-c", PROGRAM.format(code=0)]
    # Else the program's own write finds the pipe closed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == ""
