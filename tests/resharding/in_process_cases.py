"""What each rank does in test_in_process: real actors under several layouts, real vLLM engines, five updates each."""

import contextlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_riskpo.actor.actor import Actor, supervised_loss
from megatron_riskpo.config import ActorConfig, BridgeConfig, OptimizerConfig, RolloutConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.resharding import in_process
from megatron_riskpo.resharding.bridge import Bridge
from megatron_riskpo.resharding.in_process import InProcessPush
from megatron_riskpo.resharding.rounds import make_rounds
from megatron_riskpo.rollout.vllm_engine import VllmEngine
from tests.distributed.ranks import release_groups

NUM_UPDATES = 5
SMALL_BUCKET_MIB = 0.1
"""Several rounds even for models of a megabyte; a tensor of the embedding's size is cut."""


def build_engine(model: Path, options: dict[str, Any]) -> VllmEngine:
    return VllmEngine(
        model, RolloutConfig(**options), dtype="float32", max_model_len=64, world_group=dist.group.WORLD, seed=0
    )


def build_actor(model: Path, layout: dict[str, Any]) -> Actor:
    config = ActorConfig(**layout)
    optimizer = OptimizerConfig(lr=3e-3, schedule="constant", warmup_steps=0)
    return Actor.from_hf(model, config, optimizer, torch.float32, build_grid(config, seed=0))


def outcomes(folder: Path) -> dict[tuple[str, str, str, bool], list[dict[str, float]]]:
    """By (model, actor layout, vLLM's options, whether through shared memory and not over gloo): of every update the
    largest difference of log-probs, and what was compared.

    `cases.pt` in folder.parent: a list of (model's name, [actor layout], [vLLM's options], [whether through shared
    memory])."""
    results = {}
    for name, layouts, engines, ways in torch.load(folder.parent / "cases.pt"):
        for options in engines:
            engine = build_engine(folder.parent / name, options)
            for layout in layouts:
                actor = build_actor(folder.parent / name, layout)
                for shared in ways:
                    results[name, str(layout), str(options), shared] = _updates(actor, engine, shared=shared)
            engine.close()
            release_groups()
    return results


def _updates(actor: Actor, engine: VllmEngine, *, shared: bool) -> list[dict[str, float]]:
    # As where there is no room in shared memory, or the ranks are on several machines.
    with contextlib.nullcontext() if shared else patch.object(in_process, "share_among", return_value=None):
        bridge = Bridge(actor, engine, BridgeConfig(bucket_mib=SMALL_BUCKET_MIB, verify="golden", timeout_s=60), seed=0)
    push = bridge._in_process
    assert isinstance(push, InProcessPush)
    assert push.in_shared_memory == shared
    found = []
    for version in range(NUM_UPDATES + 1):
        if version:
            actor.train_step(bridge.probe, supervised_loss(bridge.probe), 1.0, NUM_UPDATES)
        metrics = bridge.sync(version)
        expected = actor.logprobs(bridge.probe, temperature=1.0)
        scores = torch.cat(engine.token_logprobs([s.tolist() for s in bridge.probe.sequences()]))
        assert push.report is not None
        assert push.report.peak_open_bytes == push.push.plan.peak_open_bytes
        found.append(metrics | {
            "difference": float((scores - expected).abs().max()),
            "rounds": len(make_rounds(push.push.plan)),
            "peak": push.report.peak_extra_bytes,
            "limit": 2 * push.layout.bucket_bytes,
            "mean": float(expected.mean()),
        })  # fmt: skip
    return found
