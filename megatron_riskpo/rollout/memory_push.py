"""New weights for servers on the ranks' machine, whose workers read them where the ranks have them: in shared memory,
or on GPUs by CUDA IPC.

Rank 0 makes the calls, the others hold still until it is done. Nothing is gathered, written or sent.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.actor_shards import ActorShards, served_layout
from megatron_riskpo.resharding.control import Control, LostRankError
from megatron_riskpo.resharding.peer_parameters import share_with_all
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.transports import shared_memory
from megatron_riskpo.rollout.joint_work import JointWork
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.server_client import ServerClient
from megatron_riskpo.rollout.server_pool import Server
from megatron_riskpo.rollout.server_push import ServerUpdate

_LEAVE_S = 5.0
"""For a server's answer at the end, which nobody needs."""


class MemoryPush:
    """Made once a run; every method but `leave` is collective over the trainer's ranks."""

    def __init__(self, config: TrainConfig, shards: ActorShards, group: dist.ProcessGroup, loop: LoopThread) -> None:
        """Servers are called in `loop`; they need not be up yet. Raises UsageError for layouts that cannot be,
        RunError, on every rank, where the ranks are not on one machine or it has no room to share their weights."""
        self._config, self._shards, self._loop = config, shards, loop
        self._num_servers = len(config.rollout.server_urls) or config.rollout.servers
        self._options = shards.layout_options(config, self._num_servers)
        plan_rank(served_layout(self._options), group.rank())  # its errors now, not once servers are up
        self._control = Control.of_all(config.bridge.timeout_s)
        self._joint = JointWork(self._control, config.run.timeout_s)
        try:
            self._own, self._records = share_with_all(shards.parameters, group)
            self._joint.of_first(self._look_whether_open, "the look at the shared weights")
        except LostRankError:
            raise
        except RunError as error:
            hint = 'set it to "network" or "file"'
            raise RunError(f'server.transport = "shared_memory": {error}; {hint}') from error
        self._told: set[str] = set()
        """Rank 0's: the servers that know where the weights are."""
        self._last: ServerUpdate | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """None: a worker's answer has no room for them."""
        return {}

    def open(self, hosts: Sequence[str]) -> None:
        """Servers are told where the weights are at their first push."""

    def run(self, servers: Callable[[], Sequence[Server]], version: int) -> ServerUpdate | None:
        """Bring the weights as they are to all servers, which only rank 0 looks for; what became of them, on rank 0.
        Raises RunError, on every rank, where a rank does not come."""
        self._own.agree(self._control, version)
        begun: list[_MemoryUpdate] = []
        phase = f"the push of version {version}"
        # In two parts, each of which may take run.timeout_s.
        self._joint.of_first(lambda: begun.append(self._begin(servers(), version)), f"the servers' pause for {phase}")
        self._joint.of_first(lambda: self._finish(begun[0]), phase)
        return begun[0] if begun else None

    def _begin(self, servers: Sequence[Server], version: int) -> "_MemoryUpdate":
        # Who was not usable may be another process than before.
        self._told &= {server.client.url for server in servers if server.usable}
        urls = [server.client.url for server in servers]
        told = {url: self._init_info(index) for index, url in enumerate(urls) if url not in self._told}
        update = _MemoryUpdate(servers, version, self._config.server.push_timeout_s, told)
        self._loop.run(update.begin(update.alive))
        return update

    def _finish(self, update: "_MemoryUpdate") -> None:
        self._loop.run(update.load())
        self._loop.run(update.finish())
        self._told, self._last = {server.client.url for server in update.alive}, update

    def _init_info(self, index: int) -> dict[str, Any]:
        """For one of the servers; which number it has only says in which order it reads from which ranks."""
        first = served_layout(self._options).rollout.rank(index % self._num_servers, 0)
        options = {
            "layout": self._options, "first_rank": first, "parameters": self._records, "dtype": self._shards.dtype,
            "with_checksums": self._config.bridge.verify == "checksum",
        }  # fmt: skip
        return {"transport": "shared_memory", "options": options}

    def _look_whether_open(self) -> None:
        handles = [handle for record in self._records if not record["on_gpu"] for handle in record["storages"][:1]]
        if not all(shared_memory.is_open_to_others(handle) for handle in handles):
            raise RunError("other processes of this machine may not open the ranks' memory (/proc/PID/fd)")

    def leave(self) -> None:
        """Servers that go on without this run let its weights go."""
        if self._last is not None and self._config.rollout.server_urls:
            self._loop.run(self._shut_down(self._last))

    async def _shut_down(self, update: ServerUpdate) -> None:
        clients = [server.client for server in update.alive]
        calls = (client.post("/shutdown_weight_transfer_engine", _LEAVE_S) for client in clients)
        await asyncio.gather(*calls, return_exceptions=True)  # who does not answer has nothing to let go, or ends


class _MemoryUpdate(ServerUpdate):
    def __init__(
        self, servers: Sequence[Server], version: int, timeout_s: float, told: Mapping[str, dict[str, Any]]
    ) -> None:
        """`told`: by address, what servers are told first that do not know where the weights are."""
        super().__init__(servers, version, timeout_s)
        self._told = told

    async def _begin(self, client: ServerClient) -> None:
        if client.url in self._told:
            await client.post("/init_weight_transfer_engine", self._timeout_s, {"init_info": self._told[client.url]})
        await super()._begin(client)

    async def load(self) -> None:
        """Have the servers read all of the weights."""
        update = {"update_info": {"content": {"version": self.version}}}
        await self._all(
            self.alive, "load the weights", lambda client: client.post("/update_weights", self._timeout_s, update)
        )
