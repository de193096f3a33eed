"""Engines for tests in one process: a default group of one rank, and nothing of it left behind."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_riskpo.config import RolloutConfig
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


def max_difference(rollouts: Rollouts, hf_model: torch.nn.Module, temperature: float) -> float:
    """Largest |rollout log-prob - transformers' log-prob| over all response tokens."""
    logprobs = rollouts.split_by_response(rollouts.rollout_logprobs)
    differences = [
        (hf_token_logprobs(hf_model, sequence.tolist(), temperature)[prompt - 1 :] - own).abs().max().item()
        for sequence, prompt, own in zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), logprobs, strict=True)
    ]
    return max(differences)
