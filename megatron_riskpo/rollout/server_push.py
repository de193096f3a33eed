"""New weights for servers, by vLLM's official calls: pause, start, a call a bucket, finish, resume.

One rank drives it. A server that fails in any of the calls is half-updated: it is reported, and must not be used.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from megatron_riskpo.resharding.bucket_file import write_bucket
from megatron_riskpo.resharding.buckets import NamedTensor
from megatron_riskpo.rollout.server_client import ServerClient, ServerError
from megatron_riskpo.rollout.server_pool import Server

_MAX_IN_FLIGHT = 2
"""Buckets whose files exist at a time: one is written while the servers load the one before."""


class Push:
    """One push of one version to `servers`, in the loop that they are called in."""

    def __init__(
        self, servers: Sequence[Server], version: int, num_tensors: int, folder: Path, timeout_s: float
    ) -> None:
        self.failed: dict[str, str] = {}
        """Address to reason."""
        self._servers = list(servers)
        self._version, self._num_tensors = version, num_tensors
        self._folder, self._timeout_s = folder, timeout_s
        self._num_sent = 0
        self._in_flight: list[asyncio.Task[None]] = []

    @property
    def alive(self) -> list[Server]:
        """Those that have not failed."""
        return [server for server in self._servers if server.client.url not in self.failed]

    async def start(self) -> None:
        """Stop the servers, keeping what they have sampled, and prepare them."""
        init = {"init_info": {"num_tensors": self._num_tensors}}
        await self._each("/init_weight_transfer_engine", init)
        await self._each("/pause?mode=abort")
        await self._all(lambda client: client.begin_update(self._version, self._timeout_s))

    async def send(self, bucket: Sequence[NamedTensor]) -> None:
        """Write one bucket and hand it over, while the one before may still be loading. Raises OSError where the
        folder is full. The tensors may change when this returns."""
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            await self._in_flight.pop(0)
        if not self.alive:
            return
        path = self._folder / f"bucket_{self._version}_{self._num_sent}"
        self._num_sent += 1
        record = await asyncio.to_thread(write_bucket, path, bucket)
        before = self._in_flight[-1] if self._in_flight else None
        self._in_flight.append(asyncio.ensure_future(self._load(record, path, before)))

    async def _load(self, record: dict[str, Any], path: Path, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        try:
            await self._each("/update_weights", {"update_info": record})
        finally:
            path.unlink(missing_ok=True)

    async def finish(self) -> None:
        """Put the weights in use, and let the servers go on."""
        await asyncio.gather(*self._in_flight)
        await self._all(lambda client: client.finish_update(self._version, self._timeout_s))
        await self._each("/resume")

    async def abandon(self) -> None:
        """After an error on the way: no server is usable, no file stays."""
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        for path in self._folder.glob(f"bucket_{self._version}_*"):
            path.unlink(missing_ok=True)

    async def _each(self, path: str, body: dict[str, Any] | None = None) -> None:
        """The same call on all servers that have not failed, at once."""
        await self._all(lambda client: client.post(path, self._timeout_s, body))

    async def _all(self, work: Callable[[ServerClient], Coroutine[Any, Any, None]]) -> None:
        await asyncio.gather(*(self._guarded(server, work(server.client)) for server in self.alive))

    async def _guarded(self, server: Server, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await server.call(work)
        except ServerError as error:
            self.failed[server.client.url] = f"push of version {self._version} failed: {error}"
