"""`riskpo serve` as a child that cannot start: what the run says of it. Servers that start: test_server_engine.py."""

import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_riskpo.config import ModelConfig
from megatron_riskpo.distributed.launch import child_environment
from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout import server_process
from megatron_riskpo.rollout.server_fleet import ServerFleet
from megatron_riskpo.rollout.server_process import ServerProcess, server_processes
from tests.server_runs import server_config


def test_a_server_that_cannot_start_is_named_with_its_own_error(tmp_path):
    config = server_config(tmp_path / "no_model")
    process = ServerProcess(config, 3, tmp_path)
    process.start()
    with pytest.raises(RunError, match=r"server 3 ended with exit code 2: error: .*no_model: no such .*server_3"):
        process.wait()
    process.stop()


def test_a_server_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    slow = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    monkeypatch.setattr(ServerProcess, "_command", lambda self: slow)
    process = ServerProcess(server_config(tmp_path, server={"start_timeout_s": 0.3, "max_restarts": 1}), 0, tmp_path)
    process.start()
    with pytest.raises(RunError, match=r"not healthy within server.start_timeout_s = 0.3 s; see .*server_0.log"):
        process.wait()
    first = process.pid
    assert process.restart()
    assert process.pid != first
    assert not process.restart()
    second = process.pid
    process.stop(grace_s=0.2)
    assert process.pid is None
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


WELL = """
import json, os, sys, time
path, = sys.argv[1:]
with open(path + ".part", "w") as file:
    json.dump({"url": "http://a:1"}, file)
os.rename(path + ".part", path)
time.sleep(600)
"""


def well_process(folder: Path, monkeypatch: pytest.MonkeyPatch, max_restarts: int) -> ServerProcess:
    """Of a program that is a healthy server at once."""
    process = ServerProcess(server_config(folder, server={"max_restarts": max_restarts}), 0, folder)
    monkeypatch.setattr(ServerProcess, "_command", lambda self: [sys.executable, "-c", WELL, str(self.endpoint)])
    return process


def test_a_server_that_the_machine_does_not_start_is_tried_again_a_bounded_number_of_times(tmp_path, monkeypatch):
    """Other ranks wait meanwhile: they must be told."""
    process = well_process(tmp_path, monkeypatch, 3)
    lines: list[str] = []
    fleet, spawn, num_refusals = ServerFleet([process], (), lines.append), server_process._spawn, 1

    def refuse(*arguments: Any) -> Any:
        nonlocal num_refusals
        num_refusals -= 1
        if num_refusals >= 0:
            raise OSError(11, "Resource temporarily unavailable")
        return spawn(*arguments)

    try:
        fleet.wait_for_all()
        monkeypatch.setattr(server_process, "_spawn", refuse)
        fleet.restart(["http://a:1"])
        assert fleet.addresses() == ["http://a:1"]
        failure = "rollout server 0 could not be started: [Errno 11] Resource temporarily unavailable"
        assert lines[1] == failure
        assert process.restarts_left == 1
        num_refusals = 10
        fleet.restart(["http://a:1"])
        with pytest.raises(RunError, match=f"is left: {re.escape(failure)}, and server.max_restarts = 3 is used up"):
            fleet.addresses()
    finally:
        fleet.close()


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    process = ServerProcess(server_config(tmp_path), 0, tmp_path / "file" / "servers")
    process.start()
    with pytest.raises(RunError, match=r"rollout server 0 could not be started: .*Not a directory: .*servers"):
        process.wait()


def test_a_process_that_the_kernel_does_not_end_is_left_behind(tmp_path, monkeypatch):
    process = well_process(tmp_path, monkeypatch, 1)
    process.start()
    process.wait()
    pid = process.pid
    with monkeypatch.context() as patched:
        patched.setattr(server_process, "_KILL_GRACE_S", 0.2)
        patched.setattr(server_process.os, "killpg", lambda *arguments: None)
        begun = time.monotonic()
        assert process.restart()
        assert time.monotonic() - begun < 5
    assert process.wait() == "http://a:1"
    os.kill(pid, signal.SIGKILL)
    process.stop(grace_s=0.0)


def test_the_server_has_what_decides_its_samples(tmp_path):
    config = server_config(tmp_path, server={"start_timeout_s": 900.0})
    config = dataclasses.replace(config, model=ModelConfig(path="m", dtype="bfloat16"))
    command = ServerProcess(config, 0, tmp_path)._command()
    options = dict(itertools.pairwise(command))
    assert options["--model.dtype"] == "bfloat16"
    assert options["--rollout.max_response_tokens"] == "40"
    assert options["--bridge.verify"] == "none"
    assert options["--server.start_timeout_s"] == "900.0"
    assert "--without-weights" in command


def test_servers_take_gpus_that_no_rank_has(tmp_path, monkeypatch):
    config = server_config(tmp_path, servers=2, tp=2)
    monkeypatch.setattr(server_process.torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [process.devices for process in server_processes(config, tmp_path, ["a"] * 4)] == ["4,5", "6,7"]
    with pytest.raises(RunError, match=r"5 ranks and rollout.servers = 2 with rollout.tp = 2 need 9 GPUs, .* has 8"):
        server_processes(config, tmp_path, ["a"] * 5)
    with pytest.raises(RunError, match=r"on one machine only, and its ranks are on 2; .* rollout.server_urls"):
        server_processes(config, tmp_path, ["a", "a", "b", "b"])


PARENT = """
import subprocess, sys
from megatron_riskpo.distributed.launch import child_environment
code = "from megatron_riskpo.distributed.launch import die_with_launcher, process_env; import time\\n"
code += "die_with_launcher(); print('rank', process_env(), flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], env=child_environment(), start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


def test_a_child_is_no_rank_and_dies_with_its_parent():
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    said = [parent.stdout.readline().split() for _ in range(2)]
    assert ["rank", "None"] in said
    (pid,) = [int(words[0]) for words in said if len(words) == 1]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Not even a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_environment_of_a_child_has_no_rank(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    environment = child_environment()
    assert not {"RANK", "WORLD_SIZE", "SLURM_JOB_ID"} & environment.keys()
    assert environment["PATH"] == os.environ["PATH"]
