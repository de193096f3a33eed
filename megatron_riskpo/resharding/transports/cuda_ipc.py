"""GPU memory that other processes of this machine read where it lies (CUDA IPC). Not run on a GPU yet.

The calls are those by which torch.multiprocessing hands CUDA tensors over; but what it pickles is JSON here, since
nothing that comes from outside may be unpickled.
"""

import base64
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.transports.shared_memory import machine

_FIELDS = ("device", "memory", "size", "offset", "counter", "counter_offset", "event", "event_is_needed")
_BYTES = ("memory", "counter", "event")


def share(storage: torch.UntypedStorage) -> dict[str, Any]:
    """How to open the storage (JSON-able), as long as it lives here. Raises RunError where it cannot be shared."""
    try:
        values = dict(zip(_FIELDS, storage._share_cuda_(), strict=True))
    except RuntimeError as error:
        raise RunError(f"weights cannot be shared by CUDA IPC: {' '.join(str(error).split())}") from error
    encoded = {name: base64.b64encode(values[name]).decode() for name in _BYTES}
    return values | encoded | {"machine": machine()}


def open_shared(handle: dict[str, Any], device: torch.device) -> Tensor:
    """The storage's bytes, uint8 [size], as seen from this process's GPU, which is the same or a peer of it. To be read
    only. Raises RunError where they cannot be."""
    if handle["machine"] != machine():
        raise RunError("a rank's weights are on another machine, and cannot be opened by CUDA IPC")
    values = handle | {name: base64.b64decode(handle[name]) for name in _BYTES}
    # The number that the owner's process has for its GPU means nothing here.
    values["device"] = device.index
    try:
        torch.cuda._lazy_init()
        storage = torch.UntypedStorage._new_shared_cuda(*(values[name] for name in _FIELDS))
    except RuntimeError as error:
        raise RunError(f"a rank's weights cannot be opened on {device} by CUDA IPC: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
