"""Pushes to two servers of two workers each, which read the weights in this process's memory, and what becomes of them
where a server is lost. The workers compare what they get with whole tensors cut by hand.

Processes, HTTP and memory are real; vLLM's part is played (shard_server.py). With vLLM, from two ranks:
test_server_engine.py. Not tested here: a GPU.
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.config import BridgeConfig, RolloutConfig, ServerConfig, TrainConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.actor_shards import ActorShards
from megatron_riskpo.resharding.layouts import ActorLayout
from megatron_riskpo.resharding.schedule import BridgeLayout
from megatron_riskpo.resharding.transports import shared_memory
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.memory_push import MemoryPush
from megatron_riskpo.rollout.planned_push import planned_push
from megatron_riskpo.rollout.server_client import ServerClient
from megatron_riskpo.rollout.server_engine import open_session
from megatron_riskpo.rollout.server_pool import Server
from tests.resharding.fault_ranks import MODEL
from tests.resharding.whole_model import actor_parameters
from tests.rollout import shard_server
from tests.rollout.fake_server import fake_server
from tests.rollout.shard_server import RESTART, TP, ShardServer
from tests.rollout.test_network_push import processes, url_of
from tests.vllm_engines import single_rank

TIMEOUT_S = 3.0
ACTOR = ActorLayout(1)


def config_of(transport: str = "shared_memory", verify: str = "checksum") -> TrainConfig:
    return TrainConfig(
        bridge=BridgeConfig(timeout_s=TIMEOUT_S, verify=verify),  # type: ignore[arg-type]
        rollout=RolloutConfig(placement="server", servers=2, tp=TP),
        server=ServerConfig(transport=transport, push_timeout_s=TIMEOUT_S),  # type: ignore[arg-type]
    )


def shards_of() -> ActorShards:
    layout = BridgeLayout.served(MODEL, ACTOR, TP, 2, 8, 1, 1)
    return ActorShards(MODEL, ACTOR, {name: tensor.clone() for name, tensor in actor_parameters(layout, 0).items()}, 1)


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


def test_what_fails_is_given_up_and_the_other_gets_the_weights(tmp_path: Path, loop: LoopThread) -> None:
    """A push each, whose fault is the second server's; after RESTART it no longer knows where the weights are."""
    faults = {1: "corruption", 2: RESTART, 4: "SIGSTOP"}
    folders = [tmp_path / str(index) for index in range(2)]
    for folder in folders:
        folder.mkdir()
    failed: list[dict[str, str]] = []
    with processes(shard_server.main, [(folders[0], {}), (folders[1], faults)]), single_rank():
        urls = [url_of(folder) for folder in folders]
        session = loop.run(open_session())
        shards = shards_of()
        push = MemoryPush(config_of(), shards, dist.group.WORLD, loop)  # type: ignore[arg-type]
        servers = [Server(ServerClient(url, session)) for url in urls]
        for version in range(5):
            start = time.monotonic()
            update = push.run(lambda now=servers: now, version)
            print(f"version {version}: {time.monotonic() - start:.1f} s")
            assert update is not None
            assert time.monotonic() - start < 3 * TIMEOUT_S
            failed.append(update.failed)
            assert urls[0] in [server.client.url for server in update.alive]
            servers = [Server(ServerClient(url, session)) if url in update.failed else server
                       for url, server in zip(urls, servers, strict=True)]  # fmt: skip
            for server in servers:
                if server.client.url not in update.failed:
                    server.admit(version)
            for tensor in shards.parameters.values():
                tensor += 1
        loop.run(session.close())
    assert [list(of) for of in failed] == [[], [urls[1]], [], [urls[1]], [urls[1]]]
    assert "is corrupted: of 1 slices from rank 0 1 have another checksum" in failed[1][urls[1]]
    assert "before it was said how they come" in failed[3][urls[1]]
    assert f"within {TIMEOUT_S:g} s" in failed[4][urls[1]]


@pytest.mark.parametrize("obstacle", ["room", "machine"])
def test_where_memory_cannot_be_shared_auto_takes_files_and_says_so(
    monkeypatch: pytest.MonkeyPatch, loop: LoopThread, obstacle: str
) -> None:
    said: list[str] = []
    expected = "MiB are free in /dev/shm"
    if obstacle == "room":
        monkeypatch.setattr(shared_memory, "room", lambda: 2**20 - 1)
    else:
        monkeypatch.setattr(dist, "all_gather_object", gather_two_machines)
        expected = "the ranks are on 2 machines"

    def made(config: TrainConfig) -> Any:
        return planned_push(config, shards_of(), dist.group.WORLD, loop, said.append)  # type: ignore[arg-type]

    with single_rank():
        with pytest.raises(RunError, match=f'"shared_memory": .*{expected}.*; set it to "network" or "file"'):
            made(config_of())
        assert made(config_of("auto", "none")) is None
        assert made(config_of("file", "none")) is None
    (line,) = said
    assert line.startswith("weights go to the servers through files: ")
    assert expected in line


def gather_two_machines(found: list[Any], own: tuple[Any, ...], group: object) -> None:
    """As of two ranks."""
    found[:] = [("a", *own[1:]), ("b", *own[1:])]


def test_the_weights_stay_where_optimizers_look(loop: LoopThread) -> None:
    shards = shards_of()
    views = {name: tensor.view(-1) for name, tensor in shards.parameters.items()}
    with single_rank():
        MemoryPush(config_of(), shards, dist.group.WORLD, loop)  # type: ignore[arg-type]
    for name, view in views.items():
        view += 1
        assert torch.equal(view, shards.parameters[name].view(-1))
        assert view.is_shared()


def test_servers_that_go_on_let_the_weights_go_at_the_end(tmp_path: Path, loop: LoopThread) -> None:
    config = config_of()
    with fake_server(ShardServer(tmp_path, {})) as server, single_rank():
        config = dataclasses.replace(
            config, rollout=RolloutConfig(placement="server", server_urls=(server.url,), tp=TP)
        )
        session = loop.run(open_session())
        push = MemoryPush(config, shards_of(), dist.group.WORLD, loop)  # type: ignore[arg-type]
        push.leave()
        assert "/shutdown_weight_transfer_engine" not in server.calls
        push.run(lambda: [Server(ServerClient(server.url, session))], version=0)
        push.leave()
        assert server.calls[-1] == "/shutdown_weight_transfer_engine"
        loop.run(session.close())
