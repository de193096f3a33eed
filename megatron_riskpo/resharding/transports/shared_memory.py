"""Host memory that other processes of this machine read where it lies.

A storage is moved into shared memory once, in place, so that all views of it stay what they are. Its file has no name,
and so is gone with the last process that maps it, however that ends.
"""

import mmap
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.errors import RunError

_MEMORY = "/dev/shm"  # torch's shared memory is there
_MOST_OF_IT = 0.95


def room() -> int:
    """Bytes that are free in shared memory, a margin left; 0 where there is none."""
    try:
        free = os.statvfs(_MEMORY)
    except OSError:
        return 0
    return int(_MOST_OF_IT * free.f_bavail * free.f_frsize)


def share(storage: torch.UntypedStorage) -> dict[str, Any]:
    """Move the storage into shared memory, where it is not yet; how to open it (JSON-able), as long as it lives here.
    Beyond `room` the process would be killed (SIGBUS)."""
    descriptor, size = storage._share_fd_cpu_()
    return {"machine": machine(), "pid": os.getpid(), "descriptor": descriptor, "size": size, "file": _id(descriptor)}


def open_shared(handle: dict[str, Any]) -> Tensor:
    """The storage's bytes, uint8 [size], to be read only. Raises RunError where this process cannot see them."""
    owner = f"the weights of process {handle['pid']}"
    if handle["machine"] != machine():
        raise RunError(f"{owner} are on another machine, and cannot be read as shared memory")
    try:
        descriptor = os.open(
            Path("/proc") / str(int(handle["pid"])) / "fd" / str(int(handle["descriptor"])), os.O_RDONLY
        )
    except OSError as error:
        raise RunError(f"{owner} cannot be opened as shared memory: {error.strerror}") from error
    try:
        if _id(descriptor) != handle["file"]:  # the same process id in another container
            raise RunError(f"{owner} are not visible here: is it in another container?")
        mapped = mmap.mmap(descriptor, handle["size"], prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


@cache
def machine() -> str:
    """The same for all processes under one kernel, until it starts anew."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _id(descriptor: int) -> list[int]:
    status = os.fstat(descriptor)
    return [status.st_dev, status.st_ino]
