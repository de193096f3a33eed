"""Buckets between two processes that share one GPU: the sender's memory, opened by the receiver.

Written after torch's own sharing of CUDA storages and not run on a GPU yet: this project is developed without one. The
handle travels as JSON (torch's would be a pickle), by whatever channel the two processes talk. The sender must neither
free nor refill the bucket before the receiver says that it has read it.
"""

import json
from typing import Any

import torch
from torch import Tensor


def export_bucket(buffer: Tensor) -> str:
    """A handle of a contiguous CUDA tensor for another process. Work queued on it is finished first."""
    torch.cuda.current_stream(buffer.device).synchronize()
    storage = buffer.untyped_storage()
    _, handle, size, offset, counter, counter_offset, event, needs_event = storage._share_cuda_()
    return json.dumps(
        {
            "device": torch.cuda.get_device_properties(buffer.device).uuid.__str__(),
            "handle": handle.hex(),
            "size": size,
            "offset": offset,
            "counter": counter.hex(),
            "counter_offset": counter_offset,
            "event": event.hex(),
            "needs_event": needs_event,
            "dtype": str(buffer.dtype).removeprefix("torch."),
            "start": buffer.storage_offset(),
            "numel": buffer.numel(),
        }
    )


def open_bucket(handle: str) -> Tensor:
    """The sender's bucket, a flat view of its memory. Raises RuntimeError where this process cannot see that GPU."""
    fields: dict[str, Any] = json.loads(handle)
    storage = torch.UntypedStorage._new_shared_cuda(
        _device_of(fields["device"]), bytes.fromhex(fields["handle"]), fields["size"], fields["offset"],
        bytes.fromhex(fields["counter"]), fields["counter_offset"], bytes.fromhex(fields["event"]),
        fields["needs_event"],
    )  # fmt: skip
    flat = torch.empty(0, dtype=getattr(torch, fields["dtype"]), device=storage.device)
    return flat.set_(storage, fields["start"], (fields["numel"],), (1,))  # type: ignore[call-overload]


def _device_of(uuid: str) -> int:
    """CUDA_VISIBLE_DEVICES may number the card differently in the two processes."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return index
    raise RuntimeError(f"the GPU {uuid} of the sender is not visible here; both processes need the same card")
