"""Servers that no longer work are given up while requests wait for them, long before those run out of time."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from megatron_riskpo.config import ServerConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.server_client import ServerError
from megatron_riskpo.rollout.server_pool import Server, ServerPool

_LONGEST_PAUSE_S = {"health": 5.0, "engine": 30.0}
"""Between two looks; every rank looks, and the engine answers in the time of its samples."""


async def watch(pool: ServerPool, config: ServerConfig) -> None:
    """For ever, in the pool's loop."""
    await asyncio.gather(
        _repeat(pool, _check_health, config.health_timeout_s, _LONGEST_PAUSE_S["health"]),
        _repeat(pool, _check_engine, config.push_timeout_s, _LONGEST_PAUSE_S["engine"]),
    )


async def _repeat(
    pool: ServerPool, check: Callable[[ServerPool, Server, float], Awaitable[None]], timeout_s: float, pause_s: float
) -> None:
    while True:
        await asyncio.sleep(min(timeout_s / 4, pause_s))
        await asyncio.gather(*(check(pool, server, timeout_s) for server in pool.usable))


async def _check_health(pool: ServerPool, server: Server, timeout_s: float) -> None:
    if not await server.client.is_healthy(timeout_s):
        pool.give_up(server, f"{server.client.url} did not answer its health check within {timeout_s:g} s, or is dead")


async def _check_engine(pool: ServerPool, server: Server, timeout_s: float) -> None:
    """vLLM calls itself healthy while its engine hangs. A call on the engine is answered between two passes of the
    model, however many requests wait; during a push, once weights are loaded."""
    started = time.monotonic()
    try:
        await server.client.weight_label(timeout_s)
    except (ServerError, RunError) as error:
        # What comes sooner, the health check and the requests judge.
        if started > pool.pushed_at and time.monotonic() - started >= timeout_s:
            pool.give_up(server, f"{error}: its engine hangs or is dead (server.push_timeout_s)")
