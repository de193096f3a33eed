"""A rank's parameters as other processes of its machine read them: where they lie, through no bucket.

Host memory is shared as nameless files, a GPU's by CUDA IPC.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.control import Control, refuse_differences
from megatron_riskpo.resharding.transports import cuda_ipc, shared_memory

VERSION_PHASE = "the version of the weights"
_MOVED = -(2**31)
_OTHER_FILES = 64
"""Files that a rank may yet open for other things."""
Parameters = Mapping[str, Tensor]
"""By their names in the family's table."""


class SharedParameters:
    """This rank's own, which others may read as long as this object lives."""

    def __init__(self, parameters: Parameters) -> None:
        """Host memory is moved into shared memory, in place; there has to be room for it (`share_with_all`). Raises
        RunError where it cannot be moved."""
        self._parameters = parameters
        storages = _storages(parameters)
        on_gpu = next(iter(parameters.values())).is_cuda
        # In this order: sharing moves them.
        places = _places(parameters, list(storages))
        share = cuda_ipc.share if on_gpu else shared_memory.share
        handles = [share(storage) for storage in storages.values()]
        self.record: dict[str, Any] = {"on_gpu": on_gpu, "parameters": places, "storages": handles}
        """What `open_parameters` takes; JSON-able."""
        self._addresses = [tensor.data_ptr() for tensor in parameters.values()]

    def agree(self, control: Control, version: int) -> None:
        """Before others read: RunError, on every rank, where a rank's parameters are not where the others look for
        them, or of another version. Collective."""
        tensors = list(self._parameters.values())
        synchronize(tensors[0].device)
        are_in_place = [tensor.data_ptr() for tensor in tensors] == self._addresses
        found = control.gather(version if are_in_place else _MOVED, f"{VERSION_PHASE}, here {version}")
        moved = [rank for rank, value in enumerate(found) if value == _MOVED]
        if moved:
            raise RunError(f"weight push: ranks {moved} have moved parameters since they said where they are")
        refuse_differences(found, VERSION_PHASE)


def open_parameters(record: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Another process's parameters, to be read only; seen from `device` where they are on a GPU. Raises RunError where
    they are not within reach."""
    if record["on_gpu"] != (device.type == "cuda"):
        raise RunError("ranks and rollout engines have to be all on GPUs, or all on CPUs, to read from each other")
    storages = [
        cuda_ipc.open_shared(handle, device) if record["on_gpu"] else shared_memory.open_shared(handle)
        for handle in record["storages"]
    ]
    return {name: _view(storages[place["storage"]], place) for name, place in record["parameters"].items()}


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on a GPU; other processes do not know this one's streams."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _storages(parameters: Parameters) -> dict[int, torch.UntypedStorage]:
    """By address, each once: parameters may be views of one buffer."""
    storages = (tensor.untyped_storage() for tensor in parameters.values())
    return {storage.data_ptr(): storage for storage in storages}


def _places(parameters: Parameters, addresses: list[int]) -> dict[str, dict[str, Any]]:
    numbers = {address: number for number, address in enumerate(addresses)}
    return {
        name: {
            "storage": numbers[tensor.untyped_storage().data_ptr()], "offset": tensor.storage_offset(),
            "shape": list(tensor.shape), "stride": list(tensor.stride()),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        for name, tensor in parameters.items()
    }  # fmt: skip


def _view(storage: Tensor, place: Mapping[str, Any]) -> Tensor:
    return storage.view(getattr(torch, place["dtype"])).as_strided(place["shape"], place["stride"], place["offset"])


@dataclass(frozen=True)
class PeerParameters:
    """Of all ranks of a group, on each of them."""

    own: SharedParameters
    of_rank: dict[int, Parameters]


def share_with_all(
    parameters: Parameters, group: dist.ProcessGroup
) -> tuple[SharedParameters, list[Mapping[str, Any]]]:
    """This rank's, and every rank's record. Raises RunError, the same on every rank, where they are not on one machine,
    or it has no room. Collective."""
    if obstacle := _obstacle(parameters, group):
        raise RunError(obstacle)
    found: list[Any] = [None] * group.size()
    own, problem = None, ""
    try:
        own = SharedParameters(parameters)
    except RunError as error:
        problem = f"rank {group.rank()}: {error}"
    dist.all_gather_object(found, (own and own.record, problem), group=group)
    if problems := [problem for _, problem in found if problem]:
        raise RunError(problems[0])
    assert own is not None
    return own, [record for record, _ in found]


def _obstacle(parameters: Parameters, group: dist.ProcessGroup) -> str:
    """Why the ranks' parameters cannot be shared on their machine, the same on all ranks; empty: they can."""
    storages = [storage for storage in _storages(parameters).values() if _is_to_be_moved(storage)]
    size = sum(storage.nbytes() for storage in storages)
    left = shared_memory.open_files_left() - _OTHER_FILES
    found: list[Any] = [None] * group.size()
    own = (shared_memory.machine(), size, shared_memory.room(), len(storages), left)
    dist.all_gather_object(found, own, group=group)
    machines, sizes, rooms, *_ = zip(*found, strict=True)
    if len(set(machines)) > 1:
        return f"the ranks are on {len(set(machines))} machines"
    if sum(sizes) > min(rooms):
        return (
            f"the weights take {sum(sizes) / 2**20:.0f} MiB of shared memory, {min(rooms) / 2**20:.0f} MiB are free in "
            "/dev/shm (containers: --shm-size; a server that a killed run has pushed to keeps its weights there until "
            "the next push, or its end)"
        )
    for _, _, _, needed, allowed in found:
        if needed > allowed:
            return f"the weights take {needed} open files, and {max(0, allowed)} are left (ulimit -n)"
    return ""


def _is_to_be_moved(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu" and not storage.is_shared()


def share_among(parameters: Parameters, group: dist.ProcessGroup) -> PeerParameters | None:
    """For CPU tensors; None, on all ranks, where they cannot be shared, or one does not see another's memory.
    Collective."""
    try:
        own, records = share_with_all(parameters, group)
    except RunError:
        return None
    found: list[Any] = [None] * group.size()
    peers: dict[int, Parameters] | None
    try:
        others = [rank for rank in range(group.size()) if rank != group.rank()]
        peers = {rank: open_parameters(records[rank], torch.device("cpu")) for rank in others}
    except RunError:
        peers = None
    dist.all_gather_object(found, peers is not None, group=group)
    return PeerParameters(own, {group.rank(): parameters, **peers}) if peers is not None and all(found) else None
