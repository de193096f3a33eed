"""Real servers for tests: `riskpo serve` processes, and the engine that talks to them, in one process of one rank."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.config import DataConfig, ModelConfig, RolloutConfig, ServerConfig, TrainConfig
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.resharding.actor_shards import ActorShards
from megatron_riskpo.resharding.layouts import ActorLayout
from megatron_riskpo.rollout.server_engine import ServerEngine
from megatron_riskpo.rollout.server_process import ServerProcess

MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 24, 40
VOCAB_SIZE = 96


def server_config(model: Path, *, server: dict[str, Any] | None = None, **rollout: Any) -> TrainConfig:
    """For the tiny models of tests."""
    return TrainConfig(
        model=ModelConfig(path=str(model)),
        data=DataConfig(max_prompt_tokens=MAX_PROMPT_TOKENS),
        rollout=RolloutConfig(placement="server", max_response_tokens=MAX_RESPONSE_TOKENS, **rollout),
        server=ServerConfig(**({"health_timeout_s": 10.0, "push_timeout_s": 60.0} | (server or {}))),
    )


@contextlib.contextmanager
def started_server(config: TrainConfig, folder: Path) -> Iterator[ServerProcess]:
    """One `riskpo serve`, which is not healthy yet."""
    process = ServerProcess(config, 0, folder)
    process.start()
    try:
        yield process
    finally:
        signal_group(process, signal.SIGCONT)
        process.stop(grace_s=0.0)


def signal_group(process: ServerProcess, number: signal.Signals) -> None:
    """To the server and its engine."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


@contextlib.contextmanager
def server_engine(
    config: TrainConfig,
    folder: Path,
    export: Callable[[], Iterable[tuple[str, Tensor]]],
    lines: list[str] | None = None,
    shards: ActorShards | None = None,
) -> Iterator[ServerEngine]:
    """`lines` gets what the engine says; with `shards` weights go by plan."""
    said = [] if lines is None else lines
    engine = ServerEngine(
        config,
        vocab_size=VOCAB_SIZE,
        world_group=dist.group.WORLD,  # type: ignore[arg-type]
        folder=folder,
        export=export,
        log=said.append,
        shards=shards,
    )
    try:
        yield engine
    finally:
        engine.close()


def with_urls(config: TrainConfig, *urls: str) -> TrainConfig:
    """The run on these servers."""
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, server_urls=urls))


def shards_of(folder: Path) -> ActorShards:
    """The weights of a checkpoint as one rank of an actor holds them."""
    hf_config = load_model_config(folder)
    shape, tensors = shape_of(hf_config), load_file(folder / "model.safetensors")
    rules = family_of(hf_config).rules(shape)
    parameters = {rule.megatron: rule.fusion.fuse([tensors[name] for name in rule.hf], shape) for rule in rules}
    return ActorShards(hf_config, ActorLayout(1), parameters, node_size=1)


def exporter(folder: Path) -> Callable[[], Iterable[tuple[str, Tensor]]]:
    """The weights of a checkpoint, anew each time."""
    return lambda: load_file(folder / "model.safetensors").items()
