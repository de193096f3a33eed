"""Pushes through files to fake servers, one of which goes wrong; to real ones: test_server_engine."""

import asyncio
from pathlib import Path

import aiohttp
import pytest
import torch

from megatron_riskpo.config import ServerConfig
from megatron_riskpo.rollout.server_client import ServerClient
from megatron_riskpo.rollout.server_pool import ServerPool
from megatron_riskpo.rollout.server_push import FilePush
from tests.rollout.fake_server import LABELS, FakeServer, fake_server

TIMEOUT_S = 5.0


async def push(servers: list[FakeServer], folder: Path, timeout_s: float = TIMEOUT_S) -> FilePush:
    """Two buckets of version 3 to those that can take them."""
    async with aiohttp.ClientSession() as session:
        pool = ServerPool(lambda url: ServerClient(url, session, LABELS), ServerConfig(), print)
        ready = await pool.ready_at([server.url for server in servers], TIMEOUT_S)
        update = FilePush(ready, 3, 2, folder, timeout_s)
        await update.start()
        for name in ("a", "b"):
            await update.send([(name, torch.ones(3))])
        await update.finish()
        return update


@pytest.mark.parametrize("kind", ["failing_calls", "refused_calls"])
@pytest.mark.parametrize(
    "path",
    ["/pause", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"],
)
def test_a_server_that_fails_is_given_up_alone(tmp_path, kind, path):
    with fake_server() as good, fake_server(**{kind: {path}}) as bad:
        update = asyncio.run(push([good, bad], tmp_path))
        assert [server.client.url for server in update.alive] == [good.url]
        (reason,) = update.failed.values()
        assert reason.startswith(f"push of version 3 failed: {bad.url}{path}")
        assert good.version == LABELS.of(3)
        assert good.calls.count("/update_weights") == 2
    assert not list(tmp_path.iterdir())


def test_a_server_has_its_time_for_a_part_of_the_push_and_not_for_each_call(tmp_path):
    with fake_server() as good, fake_server(call_delay_s=0.4) as slow:
        update = asyncio.run(push([good, slow], tmp_path, timeout_s=1.0))
        assert [server.client.url for server in update.alive] == [good.url]
        (reason,) = update.failed.values()
        assert reason.endswith(f"{slow.url} did not get ready within 1 s (server.push_timeout_s)")
        assert "/update_weights" not in slow.calls


@pytest.mark.parametrize("path", ["/health", "/weight_info"])
def test_who_refuses_to_say_how_it_is_takes_no_weights(tmp_path, path):
    with fake_server() as good, fake_server(refused_calls={path}) as other_program:
        update = asyncio.run(push([good, other_program], tmp_path))
        assert [server.client.url for server in update.alive] == [good.url]
        assert update.failed == {}
        assert other_program.calls == []
