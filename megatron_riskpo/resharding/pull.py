"""One rank's side of a push in which receivers read the senders' parameters where they lie: each number is copied once,
into the sink, and there are no buckets, no messages, and no memory besides a module of vLLM's that is not packed yet.

Nobody may change parameters meanwhile: ranks agree before that all are ready, and afterwards that all are done.
"""

import time
from collections.abc import Mapping

import torch

from megatron_riskpo.resharding.peer_parameters import Parameters, synchronize
from megatron_riskpo.resharding.plan import RankPlan
from megatron_riskpo.resharding.push import PushReport
from megatron_riskpo.resharding.rounds import make_rounds
from megatron_riskpo.resharding.sink import ShardSink, copy_slices


class WeightPull:
    """Made once a run: the plan does not change. Does what WeightPush does."""

    def __init__(self, plan: RankPlan, peers: Mapping[int, Parameters], *, with_checksums: bool = False) -> None:
        """`peers`: the parameters of each rank of the actor, this one's too."""
        self.plan = plan
        self.rounds = make_rounds(plan)
        self._peers = peers
        self._with_checksums = with_checksums
        self._device = next(iter(next(iter(peers.values())).values())).device

    @torch.no_grad()
    def run(self, sink: ShardSink, version: int) -> PushReport:
        """Copy everything, in the order of the rounds: one module of vLLM's after the other. With checksums RunError
        where what arrived is not what the source holds."""
        start = time.perf_counter()
        rank, plan = self.plan.rank, self.plan
        for step in self.rounds:
            where = f"weight push of version {version}: rank {rank}, round {step.number}"
            checked = where if self._with_checksums else ""
            for arrival in step.arrivals:
                copy_slices(arrival.parts, self._peers[arrival.peer], sink, arrival.peer, checked)
                sink.open_modules.check()
        synchronize(self._device)
        moved = plan.num_bytes(plan.remote)
        local = plan.num_bytes(plan.receives) - moved
        return PushReport(time.perf_counter() - start, moved, local, 0, sink.open_modules.peak_bytes)
