"""A rank's parameters as other processes of its machine read them: where they lie, through no bucket.

Host memory is shared as nameless files, a GPU's by CUDA IPC.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports import cuda_ipc, shared_memory

Parameters = Mapping[str, Tensor]
"""By their names in the family's table."""


class SharedParameters:
    """This rank's own, which others may read as long as this object lives."""

    def __init__(self, parameters: Parameters) -> None:
        """Host memory is moved into shared memory, in place: look whether there are `bytes_to_share` before."""
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

    def ready(self) -> None:
        """To be called before others read. RunError where a parameter is not where they will look for it."""
        tensors = list(self._parameters.values())
        if [tensor.data_ptr() for tensor in tensors] != self._addresses:
            raise RunError("a parameter of the actor was moved in memory since rollout engines were told where it is")
        synchronize(tensors[0].device)


def bytes_to_share(parameters: Parameters) -> int:
    """Of shared memory that SharedParameters takes."""
    return sum(
        storage.nbytes()
        for storage in _storages(parameters).values()
        if storage.device.type == "cpu" and not storage.is_shared()
    )


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


def obstacle_to_sharing(parameters: Parameters, group: dist.ProcessGroup) -> str:
    """Why the ranks' parameters cannot be shared on their machine, the same on all ranks; empty: they can.
    Collective."""
    found: list[Any] = [None] * group.size()
    own = (shared_memory.machine(), bytes_to_share(parameters), shared_memory.room())
    dist.all_gather_object(found, own, group=group)
    machines, needed, free = {machine for machine, _, _ in found}, sum(size for _, size, _ in found), found[0][2]
    if len(machines) > 1:
        return f"the ranks are on {len(machines)} machines"
    if needed > free:
        return (
            f"the weights take {needed / 2**20:.0f} MiB of shared memory, {free / 2**20:.0f} MiB are free in /dev/shm "
            "(containers: --shm-size)"
        )
    return ""


def share_among(parameters: Parameters, group: dist.ProcessGroup) -> PeerParameters | None:
    """For CPU tensors; None, on all ranks, where there is an obstacle, or they do not see each other's memory.
    Collective."""
    if obstacle_to_sharing(parameters, group):
        return None
    own, found = SharedParameters(parameters), [None] * group.size()
    dist.all_gather_object(found, own.record, group=group)
    peers: dict[int, Parameters] | None
    try:
        others = [rank for rank in range(group.size()) if rank != group.rank()]
        peers = {rank: open_parameters(cast(Any, found[rank]), torch.device("cpu")) for rank in others}
    except RunError:
        peers = None
    dist.all_gather_object(found, peers is not None, group=group)
    return PeerParameters(own, {group.rank(): parameters, **peers}) if peers is not None and all(found) else None
