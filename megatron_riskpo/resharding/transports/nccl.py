"""Buckets between GPU ranks: the same calls as over gloo, on NCCL's stream.

Not run on a GPU yet. NCCL's own wait does not hold up the host, so the host looks until the round is done, or broken,
or its time is up; which message of a batch hangs or broke NCCL does not tell, so that the first peer of the batch is
named.
"""

import time
from collections.abc import Sequence

import torch.distributed as dist

from megatron_riskpo.resharding.transports.base import Parcel, PeerError, blaming, launch

_LOOK_EVERY_S = 2e-4


class NcclTransport:
    """Over a process group whose CUDA tensors travel by NCCL."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> "NcclRound":
        """See Transport."""
        return NcclRound(launch(sends, receives, self.group))


class NcclRound:
    """One handle for the batch."""

    def __init__(self, works: Sequence[tuple[Parcel, str, dist.Work]]) -> None:
        self._works = works

    def receive(self, deadline: float) -> None:
        """See PendingRound."""
        self.drain(deadline)

    def drain(self, deadline: float) -> None:
        """See PendingRound."""
        for parcel, action, work in self._works:
            with blaming(parcel, action):
                while not work.is_completed():
                    if time.monotonic() > deadline:
                        raise PeerError(parcel.peer, action, f"no end in time{self._others(parcel)}")
                    time.sleep(_LOOK_EVERY_S)
                # The current stream sees what arrived. Of a batch that an error has ended it is raised here.
                work.wait()

    def _others(self, parcel: Parcel) -> str:
        others = sorted({other.peer for other, _, _ in self._works} - {parcel.peer})
        return f" (others in the batch: {others})" if others else ""
