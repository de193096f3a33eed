"""The ways to bring servers their weights by plan, each worker its shard and no more."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.distributed as dist

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_servers import transport_of, transport_on_gpus
from megatron_riskpo.errors import RiskpoError, RunError
from megatron_riskpo.resharding.actor_shards import ActorShards
from megatron_riskpo.resharding.control import LostRankError
from megatron_riskpo.rollout.loop_thread import LoopThread
from megatron_riskpo.rollout.memory_push import MemoryPush
from megatron_riskpo.rollout.network_push import NetworkPush
from megatron_riskpo.rollout.server_pool import Server
from megatron_riskpo.rollout.server_push import ServerUpdate


class PlannedPush(Protocol):
    """Every method but `leave` is collective over the trainer's ranks."""

    @property
    def metrics(self) -> dict[str, float]:
        """Rank 0's, of the last push."""
        ...

    def open(self, hosts: Sequence[str]) -> None:
        """Once servers are up; `hosts` are the ranks' machines."""
        ...

    def run(self, servers: Callable[[], Sequence[Server]], version: int) -> ServerUpdate | None:
        """Bring the weights as they are to all servers, which only rank 0 looks for; what became of them, on rank 0.
        Raises RunError, on every rank, where a rank does not come."""
        ...

    def leave(self) -> None:
        """At the end."""
        ...


def planned_push(
    config: TrainConfig, shards: ActorShards, group: dist.ProcessGroup, loop: LoopThread, log: Callable[[str], None]
) -> PlannedPush | None:
    """As the configuration says; None: whole tensors through files. Collective. Raises UsageError for layouts that
    cannot be, RunError where the ranks cannot do what it says."""
    transport, is_own_choice = transport_of(config), config.server.transport == "auto"
    if transport == "network":
        return NetworkPush(config, shards, group, loop)
    if transport == "file":
        return None
    try:
        if shards.example.is_cuda and transport_on_gpus(config) == "file":
            raise RunError('CUDA IPC has not been tried out yet (server.transport = "shared_memory" does)')
        return MemoryPush(config, shards, group, loop)
    except LostRankError:
        raise  # no way of bringing weights would help
    except RiskpoError as error:
        if not is_own_choice:
            raise
        log(f"weights go to the servers through files: {error}")
        return None
