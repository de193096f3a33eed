"""Buckets between CPU ranks of one machine: the receiver reads a message where it lies, in the sender's bucket.

Over a socket every byte is copied three times more. Where a message lies, and that it has been read, are small gloo
messages, by which a dead or stopped peer is found as over gloo. The buckets last as long as the run; their files have
lost their names once all ranks have mapped them, so that nothing is left of a run that is killed.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.resharding.transports.base import Parcel, PeerError, Transport, launch, reason_of
from megatron_riskpo.resharding.transports.gloo import GlooRound, GlooTransport, wait_for

_MEMORY = Path("/dev/shm")
_WHERE, _READ = 1, 2
"""Tags: a message lies in bucket i from byte b on; it has been read."""


class SharedMemoryTransport:
    """Over a gloo process group, whose ranks have mapped each other's buckets (`cpu_transport`)."""

    def __init__(self, group: dist.ProcessGroup, mapped: Sequence[Sequence[Tensor]]) -> None:
        """`mapped`: the bytes of each rank's buckets."""
        self.group, self.mapped = group, mapped

    def buckets(self, sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """See Transport; the same memory each time."""
        own = self.mapped[self.group.rank()]
        return [bucket[: size * like.element_size()].view(like.dtype) for bucket, size in zip(own, sizes, strict=True)]

    def start(self, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> "SharedMemoryRound":
        """See Transport. What lies in no bucket goes over gloo."""
        return SharedMemoryRound(self, sends, receives)

    def place(self, buffer: Tensor) -> Tensor | None:
        """int64 [2]: in which of this rank's buckets the buffer lies, and from which byte on."""
        for index, bucket in enumerate(self.mapped[self.group.rank()]):
            if bucket.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                return torch.tensor([index, buffer.storage_offset() * buffer.element_size()])
        return None


class SharedMemoryRound:
    """Messages to read, and those that peers have to read."""

    def __init__(self, transport: SharedMemoryTransport, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
        self._transport, self._receives = transport, receives
        places = [transport.place(parcel.buffer) for parcel in sends]
        copied = [parcel for parcel in receives if transport.place(parcel.buffer) is None]
        self._copied = GlooRound(copied, launch(
            [parcel for parcel, place in zip(sends, places, strict=True) if place is None], copied, transport.group
        ))  # fmt: skip
        self._under_way: list[tuple[Parcel, str, dist.Work]] = []
        for parcel, place in zip(sends, places, strict=True):
            if place is not None:
                self._add(dist.isend, place, parcel, _WHERE)
                self._add(dist.irecv, torch.empty(1, dtype=torch.uint8), parcel, _READ)
        self._places: list[tuple[Tensor, dist.Work] | None] = []
        for parcel in receives:
            place = None if transport.place(parcel.buffer) is None else torch.empty(2, dtype=torch.int64)
            self._places.append(place if place is None else (place, self._link(dist.irecv, place, parcel, _WHERE)))

    def _link(self, call: Any, message: Tensor, parcel: Parcel, tag: int) -> dist.Work:
        peer = {"group_dst" if call is dist.isend else "group_src": parcel.peer}
        try:
            return call(message, group=self._transport.group, tag=tag, **peer)
        except RuntimeError as error:
            raise PeerError(parcel.peer, "reaching", reason_of(error)) from error

    def _add(self, call: Any, message: Tensor, parcel: Parcel, tag: int) -> None:
        action = "sending to" if call is dist.isend else "waiting for"
        self._under_way.append((parcel, action, self._link(call, message, parcel, tag)))

    def receive(self, deadline: float) -> Sequence[Tensor]:
        """See PendingRound: views of the peers' buckets."""
        copied = iter(self._copied.receive(deadline))
        return [
            next(copied) if place is None else self._read(parcel, *place, deadline)
            for parcel, place in zip(self._receives, self._places, strict=True)
        ]

    def _read(self, parcel: Parcel, place: Tensor, work: dist.Work, deadline: float) -> Tensor:
        wait_for(parcel, "waiting for", work, deadline)
        index, start = place.tolist()
        source = self._transport.mapped[parcel.peer][index][start : start + parcel.buffer.nbytes]
        return source.view(parcel.buffer.dtype)

    def release(self) -> None:
        """The senders may fill their buckets again."""
        for parcel, place in zip(self._receives, self._places, strict=True):
            if place is not None:
                self._add(dist.isend, torch.ones(1, dtype=torch.uint8), parcel, _READ)

    def drain(self, deadline: float) -> None:
        """See PendingRound."""
        self._copied.drain(deadline)
        for parcel, action, work in self._under_way:
            wait_for(parcel, action, work, deadline)


def cpu_transport(group: dist.ProcessGroup, sizes: Sequence[int]) -> Transport:
    """Shared memory where every rank has room in it for its buckets (`sizes` in bytes) and sees all others', else
    gloo. Collective."""
    own = _files(sizes)
    paths: list[list[Path]] = [[]] * group.size()
    try:
        dist.all_gather_object(paths, own, group=group)
        is_seen = all(len(files) == len(sizes) and all(path.is_file() for path in files) for files in paths)
        mapped = [[_map(path) for path in files] for files in paths] if is_seen else []
        seen = [False] * group.size()
        dist.all_gather_object(seen, is_seen, group=group)
    finally:
        for path in own:
            path.unlink(missing_ok=True)
    return SharedMemoryTransport(group, mapped) if all(seen) else GlooTransport(group)


def _files(sizes: Sequence[int]) -> list[Path]:
    """New ones; none where there is no room."""
    paths: list[Path] = []
    try:
        for size in sizes:
            descriptor, name = tempfile.mkstemp(prefix="riskpo-bucket-", dir=_MEMORY)
            paths.append(Path(name))
            with open(descriptor, "wb") as file:
                # Reserved, not only sized: a full memory file system would be a SIGBUS later.
                # Nothing cannot be mapped.
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError:
        for path in paths:
            path.unlink(missing_ok=True)
        return []
    return paths


def _map(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
