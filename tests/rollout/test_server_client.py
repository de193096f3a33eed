import asyncio

import pytest

from megatron_riskpo.rollout import server_engine
from megatron_riskpo.rollout.server_client import ServerClient, ServerError

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As a server that closes an idle connection just as the next request is on its way."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ANSWER)
    await reader.read(1)
    writer.close()


async def post_twice(pause_s: float) -> None:
    server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
    async with server, await server_engine.open_session() as session:
        client = ServerClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", session)
        await client.post("/resume", 5.0)
        await asyncio.sleep(pause_s)
        await client.post("/resume", 5.0)


def test_a_connection_that_the_server_may_close_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServerError, match="cannot be reached"):
        asyncio.run(post_twice(0.0))
    monkeypatch.setattr(server_engine, "_KEEP_ALIVE_S", 0.1)
    asyncio.run(post_twice(0.3))
