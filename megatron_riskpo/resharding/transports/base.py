"""How buckets reach other ranks: what a transport has to do, whatever wires it uses."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Parcel:
    """One message: contiguous memory that stays untouched until its round is done."""

    peer: int
    """Rank within the transport's group."""
    buffer: Tensor


class PeerError(Exception):
    """A message did not go through: which peer's, and why."""

    def __init__(self, peer: int, action: str, reason: str) -> None:
        super().__init__(f"{action} rank {peer}: {reason}")
        self.peer = peer


class PendingRound(Protocol):
    """Messages under way. Waits raise PeerError at `deadline` (time.monotonic) or on a broken link."""

    def receive(self, deadline: float) -> None:
        """Return when all messages have come."""
        ...

    def drain(self, deadline: float) -> None:
        """Return when all have left: their memory may change."""
        ...


class Transport(Protocol):
    """Messages between two ranks arrive in the order in which both name them."""

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> PendingRound:
        """Launch a round, all its messages at once; does not wait."""
        ...


def launch(
    sends: Sequence[Parcel], receives: Sequence[Parcel], group: dist.ProcessGroup
) -> list[tuple[Parcel, str, dist.Work]]:
    """One batch of sends and receives; each message with what is done to it and its handle, or the batch's. Raises
    PeerError where a link is broken already."""
    parcels = [(parcel, "waiting for") for parcel in receives] + [(parcel, "sending to") for parcel in sends]
    if not parcels:
        return []
    # Not dist.isend and dist.irecv: those know only groups made out of the process's default group.
    device = parcels[0][0].buffer.device
    if not group._get_backend(device).supports_coalescing:
        return [(parcel, action, _begin(parcel, action, group)) for parcel, action in parcels]
    with blaming(*parcels[0]):  # NCCL: one launch, and one handle
        group._start_coalescing(device)
        for parcel, action in parcels:
            _begin(parcel, action, group)
        work = group._end_coalescing(device)
    return [(parcel, action, work) for parcel, action in parcels]


def _begin(parcel: Parcel, action: str, group: dist.ProcessGroup) -> Any:
    call = group.send if action == "sending to" else group.recv
    with blaming(parcel, action):
        return call([parcel.buffer], parcel.peer, 0)


@contextmanager
def blaming(parcel: Parcel, action: str) -> Iterator[None]:
    """PeerError for what torch raises in the body, which is done to this message, or to a batch that begins with it."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(parcel.peer, action, reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Gloo's first sentence, without the place in its sources."""
    return re.sub(r"^\[[^]]*\] *", "", " ".join(str(error).split())).split(". ")[0]


def remaining(deadline: float) -> float:
    """Seconds to a deadline, at least a millisecond."""
    return max(deadline - time.monotonic(), 1e-3)
