"""Buckets between CPU ranks: gloo's threads send while this one converts the next bucket."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_riskpo.resharding.transports.base import Parcel, blaming, launch, remaining


class GlooTransport:
    """Over a gloo process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> "GlooRound":
        """See Transport."""
        return GlooRound(receives, launch(sends, receives, self.group))


class GlooRound:
    """Each message has a handle of its own, which says whose it is when time is up."""

    def __init__(self, receives: Sequence[Parcel], works: Sequence[tuple[Parcel, str, dist.Work]]) -> None:
        """`works`: of the receives, then of the sends."""
        self._receives, self._sends = works[: len(receives)], works[len(receives) :]

    def receive(self, deadline: float) -> None:
        """See PendingRound."""
        for parcel, action, work in self._receives:
            wait_for(parcel, action, work, deadline)

    def drain(self, deadline: float) -> None:
        """See PendingRound."""
        for parcel, action, work in self._sends:
            wait_for(parcel, action, work, deadline)


def wait_for(parcel: Parcel, action: str, work: dist.Work, deadline: float) -> None:
    """Until one message has come or gone; PeerError as PendingRound."""
    with blaming(parcel, action):
        work.wait(timedelta(seconds=remaining(deadline)))
