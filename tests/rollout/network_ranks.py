"""One of two ranks of a trainer that pushes version after version to servers over the network; says how each push went
in outcome_RANK.json. Parameters are made up: those of version v are v larger than those of version 0."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.config import BridgeConfig, RolloutConfig, ServerConfig, TrainConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.actor_shards import ActorShards
from megatron_riskpo.resharding.layouts import ActorLayout
from megatron_riskpo.resharding.push import PushReport, ShardSink, WeightPush
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.transports.base import PeerError
from megatron_riskpo.resharding.transports.meeting import connect_store
from megatron_riskpo.rollout import network_push, push_ranks
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.network_push import NetworkPush
from megatron_riskpo.rollout.server_client import ServerClient
from megatron_riskpo.rollout.server_engine import open_session
from megatron_riskpo.rollout.server_pool import Server
from tests.resharding.control_ranks import init_with_store_of_rank_0
from tests.resharding.fault_ranks import MODEL
from tests.resharding.whole_model import actor_parameters
from tests.rollout.shard_server import TP

NUM_RANKS = 2
TIMEOUT_S = 2.0
DEAD_RANK, RESTARTED, OWN_ERROR = "dead rank", "restarted", "own error"
STOPPED_ASKING, STOPPED_MEETING = "first rank stopped asking", "first rank stopped meeting"
BROKEN_LINKS = {"broken link": 1, "link broken for good": 2}
"""How often rank 1 loses its link to a worker of the second server."""
RUN = WeightPush.run
ACTOR = ActorLayout(NUM_RANKS, pp=2)


def main(urls: list[str], steps: list[str], folder: Path, rank: int) -> None:
    """`steps`: a push each; DEAD_RANK: rank 1 is killed in it; RESTARTED: the servers are other processes than before;
    OWN_ERROR: rank 1 fails by itself; one of BROKEN_LINKS; rank 0 stopped while it speaks with servers or makes a group
    with them."""
    torch.set_num_threads(1)
    init_with_store_of_rank_0(folder, rank, NUM_RANKS)
    config = TrainConfig(
        bridge=BridgeConfig(bucket_mib=2**-3, timeout_s=TIMEOUT_S, verify="checksum"),
        rollout=RolloutConfig(placement="server", server_urls=tuple(urls), tp=TP),
        server=ServerConfig(push_timeout_s=10.0),
    )
    loop = LoopThread()
    session = loop.run(open_session())
    layout = BridgeLayout.served(MODEL, ACTOR, TP, len(urls), 8, config.bridge.bucket_mib, NUM_RANKS)
    shards = ActorShards(
        MODEL, ACTOR, {name: tensor.clone() for name, tensor in actor_parameters(layout, rank).items()}, NUM_RANKS
    )
    push = NetworkPush(config, shards, dist.group.WORLD, loop)  # type: ignore[arg-type]
    check_open_fails_together(push, rank)
    push.open(["here"] * NUM_RANKS)
    outcomes = []
    servers: dict[str, Server] = {}
    for version, step in enumerate(steps):
        if step == RESTARTED:
            servers = {}
        servers = {url: servers.get(url) or Server(ServerClient(url, session)) for url in urls}
        if rank == 1:
            if step == OWN_ERROR:
                break_push(1, None)
            else:
                break_push(BROKEN_LINKS.get(step, 0), PeerError(NUM_RANKS + TP, "sending to", "reset"))
        if rank == 0 and step == STOPPED_MEETING:
            network_push.join = stop_here  # type: ignore[assignment]
        look = stop_here if rank == 0 and step == STOPPED_ASKING else list(servers.values()).copy
        outcomes.append(outcome(push, look, version, is_victim=step == DEAD_RANK and rank == 1))
        failed = outcomes[-1].get("failed", {})
        for server in servers.values():
            server.admit(version)
        urls = [url for url in urls if url not in failed or "corrupted" in failed[url]]
        for tensor in shards.parameters.values():
            tensor += 1
    (folder / f"outcome_{rank}.json").write_text(json.dumps(outcomes))
    os._exit(0)


def check_open_fails_together(push: NetworkPush, rank: int) -> None:
    """Rank 1 does not reach the store: both say so."""

    def fail(*where: object) -> dist.Store:
        raise RunError("the store is not reached")

    push_ranks.connect_store = fail  # type: ignore[assignment]
    with pytest.raises(RunError, match="rank 1: the store is not reached"):
        push.open(["here"] * NUM_RANKS)
    push_ranks.connect_store = connect_store


def break_push(times: int, cause: PeerError | None) -> None:
    """So many of the next ones."""
    left = [times]

    def run(push: WeightPush, sink: ShardSink, version: int) -> PushReport:
        left[0] -= 1
        if left[0] < 0:
            return RUN(push, sink, version)
        time.sleep(0.1)
        raise RunError("rank 1 failed") from cause

    network_push.WeightPush.run = run  # type: ignore[method-assign]


def stop_here(*arguments: object) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)


def outcome(
    push: NetworkPush, look: Callable[[], list[Server]], version: int, *, is_victim: bool
) -> dict[str, Any]:  # fmt: skip
    start = time.monotonic()
    found: dict[str, Any] = {}
    if is_victim:
        network_push.WeightPush.run = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    try:
        update = push.run(look, version)
        if update is not None:
            found = {"alive": [server.client.url for server in update.alive], "failed": update.failed}
            found |= {"reports": push.reports, "metrics": push.metrics}
    except RunError as error:
        found = {"error": str(error)}
    return found | {"seconds": time.monotonic() - start, "num_groups": push._num_groups}
