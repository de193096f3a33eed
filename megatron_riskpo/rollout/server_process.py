"""Servers that the run starts itself, as child processes on this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.distributed.launch import child_environment
from megatron_riskpo.errors import RunError

_POLL_S = 0.1
_STOP_GRACE_S = 10.0
_KILL_GRACE_S = 10.0
"""For the kernel to end what was killed; a process in a call on a file system or a driver may not end."""

# What a server must know of the run's configuration.
_SHARED_OPTIONS = (
    *("run.seed", "model.dtype", "data.max_prompt_tokens", "bridge.verify", "server.start_timeout_s"),
    *("rollout.max_response_tokens", "rollout.tp", "rollout.max_num_seqs", "rollout.kv_cache_gib"),
    *("rollout.gpu_memory_utilization", "rollout.expert_parallel"),
)


@dataclass(eq=False)
class ServerProcess:
    """`riskpo serve` as a child; its output goes to `log`."""

    config: TrainConfig
    index: int
    folder: Path
    """Holds the server's log and endpoint file."""
    devices: str = ""
    """CUDA_VISIBLE_DEVICES of the server; empty: as the run's."""
    restarts_left: int = field(init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _obstacle: str = field(default="was not started", init=False)
    """Why there is no process."""
    _started: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.restarts_left = self.config.server.max_restarts

    @property
    def log(self) -> Path:
        return self.folder / f"server_{self.index}.log"

    @property
    def endpoint(self) -> Path:
        return self.folder / f"server_{self.index}.json"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it; `wait` or `url` tell when it is healthy, or that it could not be started. Call it from a thread
        that lives on: the child dies with it."""
        environment = child_environment()
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        self._started = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.endpoint.unlink(missing_ok=True)
            with self.log.open("ab") as log:
                self._process = _spawn(self._command(), environment, log)
        except OSError as error:
            self._obstacle = f"could not be started: {error}"

    def restart(self) -> bool:
        """End it and start it again; False where it was started too often."""
        if not self.restarts_left:
            return False
        self.restarts_left -= 1
        self.stop(grace_s=0.0)
        self.start()
        return True

    @property
    def has_ended(self) -> bool:
        """Whether it was started and is gone; what it has left, such as its endpoint file, does not tell."""
        return self._process is not None and self._process.poll() is not None

    def url(self) -> str | None:
        """Where it is, or None while it is not healthy. Raises RunError where it ended, or takes too long."""
        timeout_s = self.config.server.start_timeout_s
        if self._process is None:
            raise RunError(f"rollout server {self.index} {self._obstacle}")
        if self.has_ended:
            code = self._process.returncode
            raise RunError(f"rollout server {self.index} ended with exit code {code}: {self._last_line()} ({self.log})")
        with contextlib.suppress(OSError):  # it is not there yet
            return json.loads(self.endpoint.read_text(encoding="utf-8"))["url"]
        if time.monotonic() - self._started > timeout_s:
            raise RunError(
                f"rollout server {self.index} was not healthy within server.start_timeout_s = {timeout_s:g} s; "
                f"see {self.log}"
            )
        return None

    def wait(self) -> str:
        """Its address, once it is healthy. Raises RunError as `url`."""
        while True:
            url = self.url()
            if url is not None:
                return url
            time.sleep(_POLL_S)

    def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """End it and its workers: asked to first, then killed. What the kernel does not end in time stays behind."""
        process = self._process
        if process is None:
            return
        if grace_s and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_GRACE_S)
        with contextlib.suppress(OSError):
            self.endpoint.unlink(missing_ok=True)
        self._process, self._obstacle = None, "was stopped"

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "megatron_riskpo.cli", "serve", "--tokens-only", "--without-weights"]
        command += ["--endpoint", str(self.endpoint), self.config.model.path]
        for option in _SHARED_OPTIONS:
            section, _, name = option.partition(".")
            command += [f"--{option}", str(getattr(getattr(self.config, section), name))]
        return command

    def _last_line(self) -> str:
        try:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            return "it wrote nothing"
        told = [line for line in lines if line.startswith("error: ")] or lines
        return told[-1] if told else "it wrote nothing"


def _spawn(command: list[str], environment: dict[str, str], log: BinaryIO) -> subprocess.Popen[bytes]:
    # A session of its own: its engine and workers can be ended with it, and a terminal's Ctrl-C does not reach it
    # before the run has saved.
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def server_processes(config: TrainConfig, folder: Path, hosts: Sequence[str]) -> list[ServerProcess]:
    """The servers of a run, not yet started; `hosts`: of its ranks. On GPUs each takes rollout.tp of those that no rank
    has. Raises RunError where there are too few, or where ranks on other machines could not reach them."""
    if len(set(hosts)) > 1:
        raise RunError(
            f"servers that the run starts listen on one machine only, and its ranks are on {len(set(hosts))}; start "
            "servers with riskpo serve --host (slurm/serve.sbatch), and give their addresses as rollout.server_urls"
        )
    num, tp = config.rollout.servers, config.rollout.tp
    num_ranks = len(hosts)
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        return [ServerProcess(config, i, folder) for i in range(num)]
    needed = num_ranks + num * tp
    if needed > num_gpus:
        raise RunError(
            f"{num_ranks} ranks and rollout.servers = {num} with rollout.tp = {tp} need {needed} GPUs, this "
            f"machine has {num_gpus}; lower rollout.servers or rollout.tp, or give rollout.server_urls"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
    first = range(num_ranks, needed, tp)
    return [ServerProcess(config, i, folder, ",".join(visible[at : at + tp])) for i, at in enumerate(first)]
