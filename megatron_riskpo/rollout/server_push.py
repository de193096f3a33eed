"""New weights for servers, by vLLM's official calls: pause, start, updates, finish, resume.

One rank drives it. A server that fails in any of the calls is half-updated: it is reported, and must not be used.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.bucket_file import write_bucket
from megatron_riskpo.resharding.buckets import NamedTensor
from megatron_riskpo.rollout.server_client import ServerClient, ServerError
from megatron_riskpo.rollout.server_pool import Server

_MAX_IN_FLIGHT = 2
"""Buckets whose files exist at a time: one is written while the servers load the one before."""


Work = Callable[[ServerClient], Coroutine[Any, Any, None]]
"""A part of a push, on one server."""


class ServerUpdate:
    """The calls of one push of one version to `servers`, in the loop that they are called in."""

    def __init__(self, servers: Sequence[Server], version: int, timeout_s: float) -> None:
        """`timeout_s`: a server's, for each part: to get ready, to load a bucket, to put the weights in use."""
        self.failed: dict[str, str] = {}
        """Address to reason."""
        self.version = version
        self._servers, self._timeout_s = list(servers), timeout_s

    @property
    def alive(self) -> list[Server]:
        """Those that have not failed."""
        return [server for server in self._servers if server.client.url not in self.failed]

    async def begin(self, servers: Sequence[Server]) -> None:
        """Stop the servers, keeping what they have sampled, and prepare them."""
        await self._all(servers, "get ready", self._begin)

    async def finish(self) -> None:
        """Put the weights in use, and let the servers go on."""
        await self._all(self.alive, "put the weights in use", self._finish)

    def fail(self, url: str, reason: str) -> None:
        """Of a server that is not to be used."""
        self.failed.setdefault(url, f"push of version {self.version} failed: {reason}")

    async def _begin(self, client: ServerClient) -> None:
        await client.post("/pause?mode=abort", self._timeout_s)
        await client.begin_update(self.version, self._timeout_s)

    async def _finish(self, client: ServerClient) -> None:
        await client.finish_update(self.version, self._timeout_s)
        await client.post("/resume", self._timeout_s)

    async def _all(self, servers: Sequence[Server], what: str, work: Work) -> None:
        """A part of the push on these servers, of which the failed ones are left out, at once."""
        asked = [server for server in servers if server.client.url not in self.failed]
        await asyncio.gather(*(self._guarded(server, what, work) for server in asked))

    async def _guarded(self, server: Server, what: str, work: Work) -> None:
        try:
            await server.call(self._in_time(server.client, what, work))
        except (ServerError, RunError) as error:  # a refusal too: the others may take it, or all are named
            self.fail(server.client.url, str(error))

    async def _in_time(self, client: ServerClient, what: str, work: Work) -> None:
        """The part, not each of its calls: the ranks wait for it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await work(client)
        except TimeoutError as error:
            late = f"did not {what} within {self._timeout_s:g} s (server.push_timeout_s)"
            raise ServerError(f"{client.url} {late}") from error


class FilePush(ServerUpdate):
    """Whole tensors through files that the servers see, a call a bucket."""

    def __init__(
        self, servers: Sequence[Server], version: int, num_tensors: int, folder: Path, timeout_s: float
    ) -> None:
        super().__init__(servers, version, timeout_s)
        self._num_tensors, self._folder = num_tensors, folder
        self._num_sent = 0
        self._in_flight: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Make all servers ready for buckets."""
        await self.begin(self.alive)

    async def _begin(self, client: ServerClient) -> None:
        init = {"transport": "file", "options": {"num_tensors": self._num_tensors}}
        await client.post("/init_weight_transfer_engine", self._timeout_s, {"init_info": init})
        await super()._begin(client)

    async def send(self, bucket: Sequence[NamedTensor]) -> None:
        """Write one bucket and hand it over, while the one before may still be loading. Raises OSError where the
        folder is full. The tensors may change when this returns."""
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            await self._in_flight.pop(0)
        if not self.alive:
            return
        path = self._folder / f"bucket_{self.version}_{self._num_sent}"
        self._num_sent += 1
        record = await asyncio.to_thread(write_bucket, path, bucket)
        before = self._in_flight[-1] if self._in_flight else None
        self._in_flight.append(asyncio.ensure_future(self._load(record, path, before)))

    async def _load(self, record: dict[str, Any], path: Path, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        update = {"update_info": {"content": record}}
        try:
            await self._all(
                self.alive, "load a bucket", lambda client: client.post("/update_weights", self._timeout_s, update)
            )
        finally:
            path.unlink(missing_ok=True)

    async def finish(self) -> None:
        """Once all buckets are loaded, as ServerUpdate."""
        await asyncio.gather(*self._in_flight)
        await super().finish()

    async def abandon(self) -> None:
        """After an error on the way: no server is usable, no file stays."""
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        for path in self._folder.glob(f"bucket_{self.version}_*"):
            path.unlink(missing_ok=True)
