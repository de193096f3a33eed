"""What each of two ranks does in test_server_engine: real actors push by plan to a real server, whose
log-probs are compared with theirs after each of five optimizer steps."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_riskpo.actor.actor import supervised_loss
from megatron_riskpo.config import BridgeConfig
from megatron_riskpo.resharding.actor_shards import ActorShards
from megatron_riskpo.resharding.bridge import Bridge
from megatron_riskpo.rollout.server_engine import ServerEngine
from tests.resharding.in_process_cases import NUM_UPDATES, SMALL_BUCKET_MIB, build_actor
from tests.server_runs import VOCAB_SIZE, server_config, with_urls

TRANSPORTS = ("network", "shared_memory")


def outcomes(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By actor layout and server.transport, of every update what was measured. `case.pt` in folder.parent: (model,
    url, server's options, layouts)."""
    model, url, options, layouts = torch.load(folder.parent / "case.pt")
    return {
        f"{layout}, {transport}": _updates(Path(model), url, options, layout, transport, folder)
        for layout in layouts
        for transport in TRANSPORTS
    }


def _updates(
    model: Path, url: str, options: dict[str, Any], layout: dict[str, Any], transport: str, folder: Path
) -> list[dict[str, Any]]:
    bridge_config = BridgeConfig(bucket_mib=SMALL_BUCKET_MIB, verify="checksum", timeout_s=60)
    config = with_urls(server_config(model, server={"transport": transport}, **options), url)
    config = dataclasses.replace(config, bridge=bridge_config)
    actor = build_actor(model, layout)
    engine = ServerEngine(
        config, vocab_size=VOCAB_SIZE, world_group=dist.group.WORLD, folder=folder,  # type: ignore[arg-type]
        export=actor.export_weights, log=print, shards=ActorShards.of(actor),
    )  # fmt: skip
    bridge = Bridge(actor, engine, bridge_config, seed=0)
    found = []
    for version in range(NUM_UPDATES + 1):
        if version:
            actor.train_step(bridge.probe, supervised_loss(bridge.probe), 1.0, NUM_UPDATES)
        metrics: dict[str, Any] = bridge.sync(version)
        expected = actor.logprobs(bridge.probe, temperature=1.0)
        scores = torch.cat(engine.token_logprobs([sequence.tolist() for sequence in bridge.probe.sequences()]))
        found.append(metrics | {
            "difference": float((scores - expected).abs().max()), "mean": float(expected.mean()),
            "reports": getattr(engine._planned, "reports", []), "version": engine.weight_version,
        })  # fmt: skip
    engine.close()
    return found
