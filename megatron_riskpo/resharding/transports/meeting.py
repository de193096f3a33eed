"""A process group of processes that have no default group in common: the trainer's ranks and the servers' workers.

They meet at a store of the trainer's first rank. Each says that it is there and waits for the others, so that who does
not come can be named, and a meeting can be called off; a group that is being made can be neither. Then each sends its
neighbour a number, by which all links, and NCCL's communicator, are made now and not in the middle of a push.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_riskpo.distributed.patient_thread import in_time
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports.base import Parcel, PeerError, reason_of
from megatron_riskpo.resharding.transports.gloo import GlooTransport
from megatron_riskpo.resharding.transports.nccl import NcclTransport

GroupTransport = GlooTransport | NcclTransport
Result = TypeVar("Result")

_POLL_S = 0.02
_MORE_S = 1.0
"""What takes its whole time is to say so itself; only a store that hangs takes so much longer."""
_WATCHDOG_FACTOR = 20
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_ARRIVED, _CALLED_OFF = "arrived", "called_off"
LOST_PEER = "(peer lost)"
"""In what a server answers whose workers are well, but another member of the group is not."""


@dataclass(frozen=True)
class Meeting:
    """Where the members of a group meet; JSON-able."""

    address: str
    port: int
    prefix: str
    """Of the store's keys: another one for each group."""
    num_ranks: int
    timeout_s: float


def is_link_error(error: RunError) -> bool:
    """Whether another member, or the way to it, is at fault."""
    return isinstance(error.__cause__, (PeerError, RuntimeError))


def address_towards(host: str) -> str:
    """The address of this machine from which it reaches `host`. Raises RunError where it cannot."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:  # of a datagram socket connect() only chooses the route
            probe.connect(where)
            return probe.getsockname()[0]
    except OSError as error:
        raise RunError(f"there is no way to {host} for the weights of rollout servers: {error}") from error


def open_store(address: str) -> dist.TCPStore:
    """A store that listens on this address alone. Raises RunError where it cannot."""
    try:
        family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((address, 0), family=family)
        port = listener.getsockname()[1]
        return dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )  # fmt: skip
    except (OSError, RuntimeError) as error:
        raise RunError(f"the ranks cannot listen on {address} for rollout servers: {reason_of(error)}") from error


def connect_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The store of another process. Raises RunError where it is not reached in time."""
    timeout = timedelta(seconds=timeout_s)
    try:
        return _in_time(
            lambda: dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout), timeout_s
        )
    except RuntimeError as error:
        raise RunError(f"the trainer's store at {address}:{port} is not reached: {reason_of(error)}") from error


def join(store: dist.Store, meeting: Meeting, rank: int, device: torch.device) -> GroupTransport:
    """Become a member of the group: gloo for CPU tensors, NCCL for a GPU's. Collective over its members; RunError,
    within about three times the meeting's time-out, where not all come."""
    keys = dist.PrefixStore(meeting.prefix, store)
    transport: GroupTransport | None = None
    try:
        _in_time(lambda: _arrive(keys, meeting, rank), meeting.timeout_s)
        make = _nccl if device.type == "cuda" else _gloo
        transport = _in_time(lambda: make(keys, meeting, rank, device), meeting.timeout_s)
        _greet(transport, meeting, rank, device)
    except (PeerError, RuntimeError) as error:
        if transport is not None:
            leave(transport)
        raise RunError(f"rank {rank} of {meeting.num_ranks} found no group: {reason_of(error)}") from error
    return transport


def leave(transport: GroupTransport) -> None:
    """End what is under way in the group (NCCL's kernels would wait for ever). Its links, by whose end others see that
    they wait in vain, are closed when the last reference to the transport is gone."""
    transport.group.abort()


def call_off(store: dist.Store, meeting: Meeting, reason: str) -> None:
    """Have those that wait in `join` wait no longer."""
    dist.PrefixStore(meeting.prefix, store).set(_CALLED_OFF, reason)


def _in_time(work: Callable[[], Result], timeout_s: float) -> Result:
    """Its result, or error. RuntimeError where it does not return: a call to a store whose process has stopped never
    does, whatever time-out it has (torch 2.13)."""
    try:
        return in_time(work, timeout_s + _MORE_S)
    except TimeoutError as error:
        raise RuntimeError("rank 0, which has the store, does not answer") from error


def _arrive(keys: dist.Store, meeting: Meeting, rank: int) -> None:
    keys.set(str(rank), "")
    keys.add(_ARRIVED, 1)
    deadline = time.monotonic() + meeting.timeout_s
    while keys.add(_ARRIVED, 0) < meeting.num_ranks:
        is_late, is_off = time.monotonic() > deadline, keys.check([_CALLED_OFF])
        if is_late or is_off:
            missing = [other for other in range(meeting.num_ranks) if not keys.check([str(other)])]
            late = f"of {len(missing)} none came in {meeting.timeout_s:g} s"
            if missing:
                raise PeerError(missing[0], "waiting for", keys.get(_CALLED_OFF).decode() if is_off else late)
        time.sleep(_POLL_S)


def _gloo(keys: dist.Store, meeting: Meeting, rank: int, device: torch.device) -> GlooTransport:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # Not by the host's name, which many machines do not know, nor by what was set for the ranks among themselves.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(meeting.address))]
    options._timeout = timedelta(seconds=meeting.timeout_s)
    backend = dist.ProcessGroupGloo(keys, rank, meeting.num_ranks, options)
    kind = dist.ProcessGroup.BackendType.GLOO
    return GlooTransport(_group(keys, meeting, rank, backend, kind, device))


def _nccl(keys: dist.Store, meeting: Meeting, rank: int, device: torch.device) -> NcclTransport:
    torch.cuda.set_device(device)  # each thread has its own
    options: Any = dist.ProcessGroupNCCL.Options()
    # At our own deadline the group is aborted, long before torch's watchdog would (`leave`).
    options._timeout = timedelta(seconds=_WATCHDOG_FACTOR * meeting.timeout_s)
    with watchdog_spares_the_process():
        backend = dist.ProcessGroupNCCL(keys, rank, meeting.num_ranks, options)
    kind = dist.ProcessGroup.BackendType.NCCL
    return NcclTransport(_group(keys, meeting, rank, backend, kind, torch.device("cuda")))


@contextlib.contextmanager
def watchdog_spares_the_process() -> Iterator[None]:
    """For NCCL groups made in the body: torch reads it then. By default (3) its watchdog ends a process whose link
    breaks, but a lost server is no reason for a trainer to end. 2: it aborts the group, and no more."""
    before = os.environ.get(_ERROR_HANDLING)
    os.environ[_ERROR_HANDLING] = "2"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ERROR_HANDLING]
        else:
            os.environ[_ERROR_HANDLING] = before


def _group(
    keys: dist.Store, meeting: Meeting, rank: int, backend: Any, kind: Any, device: torch.device
) -> dist.ProcessGroup:
    group = dist.ProcessGroup(keys, rank, meeting.num_ranks)
    group._set_default_backend(kind)
    backend._set_sequence_number_for_group()
    group._register_backend(device, kind, backend)
    return group


def _greet(transport: GroupTransport, meeting: Meeting, rank: int, device: torch.device) -> None:
    """All members at once: NCCL makes its communicator in the first batch, for which it needs them all."""
    size, deadline = meeting.num_ranks, time.monotonic() + meeting.timeout_s
    own, other = (torch.full((1,), rank, dtype=torch.int64, device=device) for _ in range(2))
    before, after = (rank - 1) % size, (rank + 1) % size
    greeting = transport.start([Parcel(after, own)], [Parcel(before, other)])
    greeting.receive(deadline)
    greeting.drain(deadline)
    if other.item() != before:
        raise PeerError(before, "waiting for", f"it says that it is rank {other.item()}")
