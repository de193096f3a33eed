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


class ServerUpdate:
    """The calls of one push of one version to `servers`, in the loop that they are called in."""

    def __init__(self, servers: Sequence[Server], version: int, timeout_s: float) -> None:
        """`timeout_s`: of a call."""
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
        await self._each(servers, "/pause?mode=abort")
        await self._all(servers, lambda client: client.begin_update(self.version, self._timeout_s))

    async def finish(self) -> None:
        """Put the weights in use, and let the servers go on."""
        await self._all(self.alive, lambda client: client.finish_update(self.version, self._timeout_s))
        await self._each(self.alive, "/resume")

    def fail(self, url: str, reason: str) -> None:
        """Of a server that is not to be used."""
        self.failed.setdefault(url, f"push of version {self.version} failed: {reason}")

    async def _each(self, servers: Sequence[Server], path: str, body: dict[str, Any] | None = None) -> None:
        """The same call on these servers, of which the failed ones are left out, at once."""
        await self._all(servers, lambda client: client.post(path, self._timeout_s, body))

    async def _all(self, servers: Sequence[Server], work: Callable[[ServerClient], Coroutine[Any, Any, None]]) -> None:
        asked = [server for server in servers if server.client.url not in self.failed]
        await asyncio.gather(*(self._guarded(server, work(server.client)) for server in asked))

    async def _guarded(self, server: Server, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await server.call(work)
        except (ServerError, RunError) as error:  # a refusal too: the others may take it, or all are named
            self.fail(server.client.url, str(error))


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
        init = {"transport": "file", "options": {"num_tensors": self._num_tensors}}
        await self._each(self.alive, "/init_weight_transfer_engine", {"init_info": init})
        await self.begin(self.alive)

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
        try:
            await self._each(self.alive, "/update_weights", {"update_info": {"content": record}})
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
