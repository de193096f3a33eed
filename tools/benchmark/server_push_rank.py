"""One rank of server_push.py: an actor whose weights are pushed to a server, in the task's ways one after the other."""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peak_memory import peak_memory
from server_push import train_config

from megatron_riskpo.config import ActorConfig, BridgeConfig, OptimizerConfig, RunConfig, ServerConfig
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.distributed.launch import die_with_launcher, process_env
from megatron_riskpo.distributed.runtime import rank_runtime

ACTOR = ActorConfig(tp=2)


def block(task: dict[str, Any], way: str, actor: Any, grid: RankGrid, version: int) -> list[dict[str, Any]]:
    """Pushes one way; the first is left out."""
    from megatron_riskpo.resharding.actor_shards import ActorShards
    from megatron_riskpo.rollout.server_engine import ServerEngine

    config = train_config(Path(task["model"]), (task["url"],), ServerConfig(transport=way))  # type: ignore[arg-type]
    config = dataclasses.replace(config, bridge=BridgeConfig(bucket_mib=task["bucket_mib"]))
    engine = ServerEngine(
        config, vocab_size=actor.shape.vocab_size, world_group=grid.world, folder=Path(task["model"]).parent,
        export=actor.export_weights, log=print, shards=ActorShards.of(actor) if way != "file" else None,
    )  # fmt: skip
    turns = []
    for turn in range(1 + task["repeats"]):
        dist.barrier()
        with peak_memory(torch.device("cpu")) as peak:
            start = time.perf_counter()
            metrics = engine.update_weights(actor.export_weights(), version + turn)
            seconds = time.perf_counter() - start
        # Rank 0's, over the network.
        pack, received = metrics.get("perf/pack_s", 0.0), metrics.get("bridge/received_mib", 0.0) * 2**20
        turns.append({"seconds": seconds, "peak": peak.bytes, "pack": pack, "received": received})
    engine.close()
    return turns[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path, help="JSON: model, url, ways, bucket_mib, repeats")
    arguments = parser.parse_args()
    die_with_launcher()
    env = process_env()
    if env is None:
        parser.error("start it through server_push.py, which gives it its ranks")
    task = json.loads(arguments.task.read_text())
    with rank_runtime(env, RunConfig(), ACTOR) as grid:
        # Megatron may only be imported once rank_runtime has put the CPU backend in place.
        from megatron_riskpo.actor.actor import Actor

        actor = Actor.from_hf(task["model"], ACTOR, OptimizerConfig(), torch.float32, grid)
        blocks = []
        for index, way in enumerate(task["ways"]):
            turns = block(task, way, actor, grid, version=index * (1 + task["repeats"]))
            blocks.append({"way": way, "turns": turns})
        arguments.task.with_name(f"rank_{grid.rank}.json").write_text(json.dumps({"blocks": blocks}))


if __name__ == "__main__":
    main()
