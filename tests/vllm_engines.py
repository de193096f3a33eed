"""Engines for tests in one process: a default group of one rank, and nothing of it left behind."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_riskpo.config import ActorConfig, RolloutConfig
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.resharding.placements import expected_numbers, planned_placements
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.rollout.types import Rollouts
from megatron_riskpo.rollout.vllm_engine import VllmEngine
from tests.tiny_models import hf_token_logprobs


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """A gloo default group of this process alone; environment variables are given back."""
    with mock.patch.dict(os.environ):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def vllm_engine(folder: Path, **changes: Any) -> Iterator[VllmEngine]:
    arguments = {"dtype": "float32", "max_model_len": 64, "seed": 0, "load_checkpoint": True} | changes
    engine = VllmEngine(folder, RolloutConfig(), world_group=dist.group.WORLD, **arguments)
    try:
        yield engine
    finally:
        engine.close()


def push_folder(engine: VllmEngine, folder: Path, version: int, spoil: Callable[[], None] | None = None) -> None:
    """A checkpoint into the engine, cut out of whole tensors; collective. `spoil` is called half-way."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank() % engine.tp
    layout = BridgeLayout.colocated(
        load_model_config(folder), ActorConfig(), num_ranks, engine.tp, item_size=4, bucket_mib=1.0, node_size=num_ranks
    )
    sink = engine.shard_sink(expected_numbers(layout, rank))
    tensors = load_file(folder / "model.safetensors")

    def move() -> None:
        for index, (name, places) in enumerate(planned_placements(layout, rank).items()):
            if spoil is not None and index == len(tensors) // 2:
                spoil()
            for place in places:
                source, target = (tuple(slice(*ends) for ends in box) for box in (place.source, place.target))
                part = tensors[name][source]
                storage = sink.parameter(place.parameter)[target]
                storage.copy_(part.view_as(storage))
                sink.arrived(place.parameter, part.numel())

    engine.update_shards(sink, move, version, lambda found: None)


def max_difference(rollouts: Rollouts, hf_model: torch.nn.Module, temperature: float) -> float:
    """Largest |rollout log-prob - transformers' log-prob| over all response tokens."""
    logprobs = rollouts.split_by_response(rollouts.rollout_logprobs)
    differences = [
        (hf_token_logprobs(hf_model, sequence.tolist(), temperature)[prompt - 1 :] - own).abs().max().item()
        for sequence, prompt, own in zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), logprobs, strict=True)
    ]
    return max(differences)
