"""A write that hangs does not keep its process from ending as any failed run does.

test_saver.py has what becomes of the run; here is what becomes of the process, whose thread waits in C++.
"""

import os
import subprocess
import sys

import pytest

from tests.distributed.ranks import ROOT


@pytest.mark.slow
def test_process_ends_while_a_write_hangs():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.checkpoint.hung_ranks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: checkpoint step_2 was not written within run.timeout_s = 1 s; earlier ")
