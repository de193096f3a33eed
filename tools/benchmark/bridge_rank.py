"""One rank of bridge.py: memcpy, planned pushes and whole gather of the same weights in turn; then a real engine."""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peak_memory import peak_memory
from torch import Tensor

from megatron_riskpo.config import ActorConfig, BridgeConfig, OptimizerConfig, RolloutConfig, RunConfig
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.distributed.launch import die_with_launcher, process_env
from megatron_riskpo.distributed.runtime import rank_runtime
from megatron_riskpo.resharding.layout_check import Placement
from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout
from megatron_riskpo.resharding.memory_sink import MemorySink
from megatron_riskpo.resharding.peer_parameters import share_among
from megatron_riskpo.resharding.pieces import Model
from megatron_riskpo.resharding.placements import planned_placements
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.pull import WeightPull
from megatron_riskpo.resharding.push import WeightPush
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.transports.gloo import GlooTransport


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds between two barriers, and this rank's memory at the peak above that before."""
    dist.barrier()
    with peak_memory(torch.device("cpu")) as peak:
        start = time.perf_counter()
        work()
        dist.barrier()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak.bytes}


def gather_into(sink: MemorySink, weights: Iterable[tuple[str, Tensor]], places: dict[str, list[Placement]]) -> None:
    """The first form of the bridge: every tensor whole on every rank, of which the rank takes its part."""
    for name, whole in weights:
        for place in places[name]:
            source, target = (tuple(slice(*ends) for ends in box) for box in (place.source, place.target))
            sink.parameters[place.parameter][target].copy_(whole[source])


def transfer(task: dict[str, Any], actor: dict[str, Any], tp: int) -> dict[str, Any]:
    """Four ways to fill this rank's shard, taking turns."""
    # Megatron may only be imported once rank_runtime has put the CPU backend in place.
    from megatron_riskpo.actor.model import build_policy_model, named_parameters
    from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
    from megatron_riskpo.resharding.export import export_weights, plan_export

    hf_config, config = load_model_config(task["model"]), ActorConfig(**actor)
    grid = build_grid(config, seed=0)
    chunks = build_policy_model(hf_config, config, torch.float32, grid)
    parameters, num_ranks = dict(named_parameters(chunks)), grid.world.size()
    rollout = RolloutLayout(tp, num_ranks // tp)
    layout = BridgeLayout(
        Model.of(hf_config), ActorLayout.of(config, num_ranks), rollout, 4, int(task["bucket_mib"] * 2**20)
    )
    sink = MemorySink(layout, grid.rank % tp, next(iter(parameters.values())).data)
    plan = plan_rank(layout, grid.rank)
    peers = share_among(parameters, grid.world)
    assert peers is not None, "there is no room for the weights in shared memory"
    pull = WeightPull(plan, peers.of_rank)
    over_sockets = WeightPush(plan, parameters, GlooTransport(grid.world), timeout_s=600)
    shape = shape_of(hf_config)
    exported, places = (
        plan_export(chunks, family_of(hf_config), shape, grid),
        planned_placements(layout, grid.rank % tp),
    )
    gather_into(sink, export_weights(chunks, exported, shape, grid), places)
    reference = {name: tensor.clone() for name, tensor in sink.parameters.items()}
    ways: dict[str, Callable[[], object]] = {
        "memcpy": lambda: [sink.parameters[name].copy_(tensor) for name, tensor in reference.items()],
        "push": lambda: pull.run(sink, 0),
        "push over sockets": lambda: over_sockets.run(sink, 0),
        "gather": lambda: gather_into(sink, export_weights(chunks, exported, shape, grid), places),
    }
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(1 + task["repeats"]):
        for name, work in ways.items():
            for tensor in sink.parameters.values():
                tensor.zero_()
            found = timed(work)
            assert all(torch.equal(sink.parameters[key], tensor) for key, tensor in reference.items()), name
            if turn:  # the first does not count
                turns[name].append(found)
    return {
        "turns": turns,
        "shard": plan.num_bytes(plan.receives), "received": plan.num_bytes(plan.remote),
        "buckets": 2 * layout.bucket_bytes, "rounds": len(over_sockets.rounds),
    }  # fmt: skip


def engine(task: dict[str, Any], actor: dict[str, Any], tp: int) -> dict[str, list[float]]:
    """Whole syncs into vLLM: what of them is its own packing."""
    from megatron_riskpo.actor.actor import Actor
    from megatron_riskpo.resharding.bridge import Bridge
    from megatron_riskpo.rollout.vllm_engine import VllmEngine

    config = ActorConfig(**actor)
    grid = build_grid(config, seed=0)
    model = Actor.from_hf(task["model"], config, OptimizerConfig(), torch.float32, grid)
    vllm = VllmEngine(task["model"], RolloutConfig(tp=tp), dtype="float32", max_model_len=64, world_group=grid.world,
                      seed=0)  # fmt: skip
    bridge = Bridge(model, vllm, BridgeConfig(bucket_mib=task["bucket_mib"]), seed=0)
    found: dict[str, list[float]] = {"sync": [], "pack": []}
    for version in range(1 + task["repeats"]):
        dist.barrier()
        start = time.perf_counter()
        metrics = bridge.sync(version)
        if version:
            found["sync"].append(time.perf_counter() - start)
            found["pack"].append(metrics["perf/pack_s"])
    vllm.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path, help="JSON: model, cases, bucket_mib, repeats, with_engine")
    arguments = parser.parse_args()
    die_with_launcher()
    env = process_env()
    if env is None:
        parser.error("start it through bridge.py, which gives it its ranks")
    task = json.loads(arguments.task.read_text())
    with rank_runtime(env, RunConfig(), ActorConfig()) as grid:
        report = {}
        for name, (actor, tp) in task["cases"].items():
            report[name] = transfer(task, actor, tp)
            if task["with_engine"]:
                report[name]["engine"] = engine(task, actor, tp)
        arguments.task.with_name(f"rank_{grid.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
