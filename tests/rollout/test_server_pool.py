"""Requests over several servers that fail in every way, by servers made for it; real ones:
test_server_engine.py."""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from megatron_riskpo.config import ServerConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.server_client import ServerClient
from megatron_riskpo.rollout.server_pool import NoServersError, Response, Server, ServerPool, continued_seed
from megatron_riskpo.rollout.server_watch import watch
from megatron_riskpo.rollout.types import SamplingConfig
from megatron_riskpo.rollout.weight_labels import WeightLabels
from tests.rollout.fake_server import LABELS, VOCAB_SIZE, FakeServer, fake_server, token_at

SAMPLING = SamplingConfig(group_size=1, max_response_tokens=8, temperature=1.0, stop_token_ids=(1,))
CONFIG = ServerConfig(health_timeout_s=1.0, request_timeout_s=20.0, push_timeout_s=1.0, max_retries=2)
OTHERS = WeightLabels("4567cdef")
"""Of another run."""


def with_pool(
    servers: list[FakeServer], work: Callable[[ServerPool], Awaitable[Any]], config: ServerConfig = CONFIG
) -> tuple[ServerPool, list[str]]:
    """Run `work` on a watched pool of admitted servers that hold version 0; the pool and what it said."""
    lines: list[str] = []

    async def run() -> ServerPool:
        async with aiohttp.ClientSession() as session:
            pool = ServerPool(lambda url: ServerClient(url, session, LABELS, VOCAB_SIZE), config, lines.append)
            pool.newest_version = 0
            await pool.admit([server.url for server in servers])
            watching = asyncio.create_task(watch(pool, config))
            await work(pool)
            watching.cancel()
            return pool

    return asyncio.run(run()), lines


def responses(num: int) -> list[Response]:
    return [Response([20 + i], seed=i, oldest_version=0) for i in range(num)]


def completing(wanted: list[Response]) -> Callable[[ServerPool], Awaitable[Any]]:
    return lambda pool: asyncio.gather(*(pool.complete(response, SAMPLING) for response in wanted))


def assert_complete(wanted: list[Response]) -> None:
    for response in wanted:
        assert response.tokens == [token_at(response.seed, position) for position in range(8)]
        assert response.logprobs == [-token / 10 for token in response.tokens]
        assert response.versions == [0] * 8
        assert response.reason == "length"


def test_requests_are_shared_out_and_bounded():
    wanted = responses(40)
    config = ServerConfig(max_concurrent=6)
    with fake_server(delay_s=0.02) as quick, fake_server(delay_s=0.1) as slow:
        with_pool([quick, slow], completing(wanted), config)
        assert_complete(wanted)
        assert quick.busiest + slow.busiest <= 7  # 6, and one as the balance changes
        assert quick.busiest == slow.busiest == 3
        assert len(slow.requests) < len(quick.requests) < 40


def test_requests_that_fail_are_sent_again_with_the_same_seed():
    wanted = responses(3)
    with fake_server(fail_next=3) as server:
        pool, lines = with_pool([server], completing(wanted))
        assert_complete(wanted)
        assert (len(server.requests), pool.servers[0].failures, lines) == (6, 0, [])
        seeds = [body["sampling_params"]["seed"] for body in server.requests]
        assert sorted(seeds) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("trouble", "reason", "at_most_s"),
    [
        ({"fail_next": 10**6}, "/inference/v1/generate answered 500: made to fail (3 times in a row)", 5.0),
        ({"failing_calls": {"/health", "/inference/v1/generate"}}, "answered 500", 2.0),
        ({"silent": True}, "did not answer its health check within 1 s", 4.0),
        ({"version": LABELS.of(7)}, "sampled with weights '0123abcd-7', not of version 0: it missed a push", 2.0),
        ({"version": OTHERS.of(0)}, "sampled with weights '4567cdef-0', not of version 0: another run pushes to", 2.0),
        ({"version": "default"}, "sampled with weights 'default', not of version 0: it was started anew", 2.0),
        ({"hangs": True}, "did not answer /weight_info within 1 s: its engine hangs or is dead", 4.0),
        ({"spoiled": {"finish_reason": None}}, "gave an answer without a reason for its end that is known (None)", 5.0),
        ({"spoiled": {"logprobs": {"content": [{"logprob": math.nan}] * 8}}}, "without finite log-probs (nan)", 5.0),
        ({"spoiled": {"token_ids": [VOCAB_SIZE] * 8}}, "without tokens of the vocabulary (96 to 96, not 0 to 95)", 5.0),
        ({"garbled": True}, "gave an answer without 'logprobs'", 5.0),
        ({"binary": True}, "gave an answer without 'choices'", 5.0),
        # Another program has its port now.
        ({"health_status": 404}, "did not answer its health check within 1 s, or is dead", 4.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_failing_server_is_given_up_and_the_others_do_its_work(trouble, reason, at_most_s):
    wanted: list[Response] = []
    started = time.monotonic()

    async def work(pool: ServerPool) -> None:
        while len(pool.usable) == 2:
            wanted.extend(responses(12))
            await completing(wanted[-12:])(pool)

    with fake_server() as good, fake_server(**trouble) as bad:
        pool, (line,) = with_pool([good, bad], work)
        assert time.monotonic() - started < at_most_s
        assert [server.client.url for server in pool.usable] == [good.url]
        assert line.startswith(f"rollout server given up: {bad.url}")
        assert reason in line
    assert_complete(wanted)


def test_without_servers_the_responses_wait_as_they_are():
    wanted = responses(2)

    async def work(pool: ServerPool) -> None:
        await pool.complete(wanted[0], SAMPLING)
        server.abort_after, server.failing_calls = 3, set()
        with contextlib.suppress(NoServersError):
            task = asyncio.ensure_future(pool.complete(wanted[1], SAMPLING))
            while len(wanted[1].tokens) < 3:
                server.failing_calls = {"/health", "/inference/v1/generate"} if len(server.requests) > 1 else set()
                await asyncio.sleep(0.005)
            await task

    with fake_server(delay_s=0.05) as server:
        pool, _ = with_pool([server], work)
        assert pool.usable == []
        assert_complete(wanted[:1])
        assert (len(wanted[1].tokens), wanted[1].reason) == (3, "")


def test_an_aborted_response_goes_on_with_the_new_weights():
    (response,) = wanted = responses(1)

    async def work(pool: ServerPool) -> None:
        task = asyncio.ensure_future(pool.complete(response, SAMPLING))
        while not server.requests:
            await asyncio.sleep(0.001)
        pool.newest_version = 1  # the push that stops the servers
        while len(server.requests) == 1:
            await asyncio.sleep(0.001)
        server.version = LABELS.of(1)
        await task

    with fake_server(abort_after=3, delay_s=0.1) as server:
        with_pool([server], work)
    first, second = server.requests
    assert response.versions == [0] * 3 + [1] * 5
    assert second["token_ids"] == [*first["token_ids"], *response.tokens[:3]]
    assert second["sampling_params"]["max_tokens"] == 5
    # The random numbers of the first tokens must not come again.
    assert second["sampling_params"]["seed"] == continued_seed(0, 3) != first["sampling_params"]["seed"]
    assert wanted[0].reason == "length"


def test_an_abort_at_the_last_token_is_the_end():
    (response,) = wanted = responses(1)
    with fake_server(abort_after=8) as server:
        with_pool([server], completing(wanted))
        assert len(server.requests) == 1
    assert (len(response.tokens), response.reason) == (8, "length")


def test_a_refused_request_ends_the_run_and_blames_no_server():
    with fake_server() as server, pytest.raises(RunError, match=r"refused a request with 400: token id out of voc"):
        with_pool([server], completing([Response([999], seed=0, oldest_version=0)]))


def test_a_server_that_is_gone_is_given_up_at_once():
    wanted = responses(4)
    with fake_server() as good:
        with fake_server() as gone:
            pass
        started = time.monotonic()
        _, (line,) = with_pool([gone, good], completing(wanted))
        assert time.monotonic() - started < 2
    assert f"{gone.url} cannot be reached" in line
    assert_complete(wanted)


def test_an_engine_that_loads_weights_is_not_taken_for_one_that_hangs():
    async def work(pool: ServerPool) -> None:
        await asyncio.sleep(0.2)  # it is being asked
        pool.begin_push(1)
        await asyncio.sleep(0.6)
        server.hangs = False
        await pool.admit([server.url])
        await asyncio.sleep(0.3)

    with fake_server(hangs=True) as server:
        pool, lines = with_pool([server], work, dataclasses.replace(CONFIG, push_timeout_s=0.4))
    assert (len(pool.usable), lines) == (1, [])


def test_pauses_after_failures_grow_up_to_a_bound():
    async def pauses() -> list[float]:
        async with aiohttp.ClientSession() as session:
            server = Server(ServerClient("http://a:1", session), failed_at=100.0)
            return [dataclasses.replace(server, failures=num).ready_at for num in (0, 1, 2, 3, 6, 7, 10_000)]

    assert asyncio.run(pauses()) == [0.0, 100.25, 100.5, 101.0, 108.0, 110.0, 110.0]


def test_continued_seeds_differ():
    seeds = {continued_seed(seed, position) for seed in range(20) for position in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
