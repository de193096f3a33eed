"""A server's worker that reads its shard, by plan, where the trainer's ranks have it in the memory of this machine."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_riskpo.resharding.actor_shards import layout_for_server
from megatron_riskpo.resharding.peer_parameters import open_parameters
from megatron_riskpo.resharding.plan import plan_rank
from megatron_riskpo.resharding.pull import WeightPull
from megatron_riskpo.resharding.push import PushReport
from megatron_riskpo.resharding.sink import ShardSink


class MemoryReceiver:
    """Opens the ranks' parameters once, and reads them at each push."""

    def __init__(self, options: Mapping[str, Any], tp_rank: int, tp: int, device: torch.device) -> None:
        """`options` are those of MemoryPush. RunError where a rank's memory is not within reach."""
        self.layout, self.tp_rank = layout_for_server(options["layout"], tp), tp_rank
        plan = plan_rank(self.layout, options["first_rank"] + tp_rank)
        records = options["parameters"]
        peers = {rank: open_parameters(records[rank], device) for rank in sorted(set(plan.receives["source"].tolist()))}
        self._pull: WeightPull | None = WeightPull(plan, peers, with_checksums=options["with_checksums"])

    def receive(self, sink: ShardSink, version: int, prepare: Callable[[], None] = lambda: None) -> PushReport:
        """This worker's part of a push, after `prepare`. Raises RunError."""
        prepare()
        assert self._pull is not None, "it is closed"
        return self._pull.run(sink, version)

    def close(self) -> None:
        """Let the ranks' memory go."""
        self._pull = None
