"""New weights for servers on the ranks' machine, whose workers read them where the ranks have them: in shared memory,
or on GPUs by CUDA IPC.

Rank 0 makes the calls, the others hold still until it is done. Nothing is gathered, written or sent.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.actor_shards import ActorShards, served_layout
from megatron_riskpo.resharding.control import Control
from megatron_riskpo.resharding.peer_parameters import SharedParameters, obstacle_to_sharing
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.rollout.first_rank import from_first
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.server_client import ServerClient
from megatron_riskpo.rollout.server_pool import Server
from megatron_riskpo.rollout.server_push import ServerUpdate


class MemoryPush:
    """Made once a run; every method but `leave` is collective over the trainer's ranks."""

    def __init__(self, config: TrainConfig, shards: ActorShards, group: dist.ProcessGroup, loop: LoopThread) -> None:
        """Servers are called in `loop`; they need not be up yet. Raises UsageError for layouts that cannot be,
        RunError, on every rank, where the ranks are not on one machine or it has no room to share their weights."""
        self._config, self._shards, self._group, self._loop = config, shards, group, loop
        self._num_servers = len(config.rollout.server_urls) or config.rollout.servers
        self._options = shards.layout_options(config, self._num_servers)
        plan_rank(served_layout(self._options), group.rank())  # its errors now, not once servers are up
        if obstacle := obstacle_to_sharing(shards.parameters, group):
            raise RunError(f'server.transport = "shared_memory": {obstacle}; set it to "network" or "file"')
        self._own = SharedParameters(shards.parameters)
        self._records: list[Any] = [None] * group.size()
        dist.all_gather_object(self._records, self._own.record, group=group)
        self._control = Control(dist.new_group(backend="gloo"), config.bridge.timeout_s)  # type: ignore[arg-type]
        self._told: set[str] = set()
        """Rank 0's: the servers that know where the weights are."""

    @property
    def metrics(self) -> dict[str, float]:
        """None: a worker's answer has no room for them."""
        return {}

    def open(self, hosts: Sequence[str]) -> None:
        """Servers are told where the weights are at their first push."""

    def run(self, servers: Callable[[], Sequence[Server]], version: int) -> ServerUpdate | None:
        """Bring the weights as they are to all servers, which only rank 0 looks for; what became of them, on rank 0.
        Raises RunError, on every rank, where a rank does not come."""
        self._own.ready()
        self._control.agree(version, "the version of the weights")
        begun: list[_MemoryUpdate] = []
        # In two parts: others wait for the first rank in a collective.
        from_first(lambda: begun.append(self._begin(servers(), version)), self._group)
        from_first(lambda: self._finish(begun[0]), self._group)
        return begun[0] if begun else None

    def _begin(self, servers: Sequence[Server], version: int) -> "_MemoryUpdate":
        # Who was not usable may be another process than before.
        self._told &= {server.client.url for server in servers if server.usable}
        anew = {server.client.url for server in servers} - self._told
        timeout_s = self._config.server.push_timeout_s
        update = _MemoryUpdate(servers, version, timeout_s, self._init_info(), anew)
        self._loop.run(update.begin(update.alive))
        return update

    def _finish(self, update: "_MemoryUpdate") -> None:
        self._loop.run(update.load())
        self._loop.run(update.finish())
        self._told = {server.client.url for server in update.alive}

    def _init_info(self) -> dict[str, Any]:
        """All servers get the same: by what a worker reads it makes no difference which of them it is."""
        layout = served_layout(self._options)
        options = {
            "layout": self._options, "first_rank": layout.rollout.rank(0, 0), "parameters": self._records,
            "dtype": self._shards.dtype, "with_checksums": self._config.bridge.verify == "checksum",
        }  # fmt: skip
        return {"transport": "shared_memory", "options": options}

    def leave(self) -> None:
        """Servers keep what they have opened until they are told otherwise."""


class _MemoryUpdate(ServerUpdate):
    def __init__(
        self, servers: Sequence[Server], version: int, timeout_s: float, init_info: dict[str, Any], anew: set[str]
    ) -> None:
        """Servers at the addresses `anew` are told first where the weights are."""
        super().__init__(servers, version, timeout_s)
        self._init_info, self._anew = init_info, anew

    async def _begin(self, client: ServerClient) -> None:
        if client.url in self._anew:
            await client.post("/init_weight_transfer_engine", self._timeout_s, {"init_info": self._init_info})
        await super()._begin(client)

    async def load(self) -> None:
        """Have the servers read all of the weights."""
        update = {"update_info": {"content": {"version": self.version}}}
        await self._all(
            self.alive, "load the weights", lambda client: client.post("/update_weights", self._timeout_s, update)
        )
