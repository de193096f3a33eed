"""Host memory that other processes of this machine read where it lies.

A storage is moved into shared memory once, in place, so that all views of it stay what they are. Its file has no name,
and so is gone with the last process that maps it, however that ends.
"""

import mmap
import os
import resource
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.errors import RunError

_MEMORY = "/dev/shm"  # torch's shared memory is there
_MOST_OF_IT = 0.95
_CHILD_S = 60.0


def room() -> int:
    """Bytes that are free in shared memory, a margin left; 0 where there is none."""
    try:
        free = os.statvfs(_MEMORY)
    except OSError:
        return 0
    return int(_MOST_OF_IT * free.f_bavail * free.f_frsize)


def open_files_left() -> int:
    """How many more files this process may have open; each storage that is shared is one."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/proc/self/fd"))


def share(storage: torch.UntypedStorage) -> dict[str, Any]:
    """Move the storage into shared memory, where it is not yet; how to open it (JSON-able), as long as it lives here.
    Beyond `room` the process would be killed (SIGBUS). Raises RunError where it cannot be."""
    try:
        descriptor, size = storage._share_fd_cpu_()
    except RuntimeError as error:
        raise RunError(f"weights cannot be moved into shared memory: {' '.join(str(error).split())}") from error
    return {"machine": machine(), "pid": os.getpid(), "descriptor": descriptor, "size": size, "file": _id(descriptor)}


def is_open_to_others(handle: dict[str, Any]) -> bool:
    """Whether another process, of the same user, can open it. The owner itself always can."""
    command = [sys.executable, "-I", "-c", "import os, sys; os.open(sys.argv[1], os.O_RDONLY)", _path(handle)]
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False, timeout=_CHILD_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def open_shared(handle: dict[str, Any]) -> Tensor:
    """The storage's bytes, uint8 [size], to be read only. Raises RunError where this process cannot see them."""
    owner = f"the weights of process {handle['pid']}"
    if handle["machine"] != machine():
        raise RunError(f"{owner} are on another machine, and cannot be read as shared memory")
    try:
        mapped = _map(handle)
    except OSError as error:
        raise RunError(f"{owner} cannot be opened as shared memory: {error.strerror}") from error
    if mapped is None:
        raise RunError(f"{owner} are not visible here: is it in another container?")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _map(handle: dict[str, Any]) -> mmap.mmap | None:
    """None: that is another file. A process of another container may have the same number, and anything open."""
    descriptor = os.open(_path(handle), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        return mmap.mmap(descriptor, handle["size"], prot=mmap.PROT_READ) if _id(descriptor) == handle["file"] else None
    finally:
        os.close(descriptor)


def _path(handle: dict[str, Any]) -> str:
    return f"/proc/{handle['pid']:d}/fd/{handle['descriptor']:d}"


@cache
def machine() -> str:
    """The same for all processes under one kernel, until it starts anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def _id(descriptor: int) -> list[int]:
    status = os.fstat(descriptor)
    return [status.st_dev, status.st_ino]
