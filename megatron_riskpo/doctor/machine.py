"""The machine: GPUs and their libraries, host memory, limits, sandbox, file system."""

import ctypes
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_riskpo.doctor.line import Line

GIB = 2**30
MIB = 2**20
OLDEST_ARCHITECTURE = (8, 0)
"""Compute capability: bfloat16 products."""
FREE_SHARE = 0.9
"""Of a GPU's memory that should be free: what others hold is missing at step 1."""
HOST_GIB_A_GPU = 32
"""Weights pass through the host, and an offloaded optimizer stays there."""
OPEN_FILES = 4096
WRITE_RATE = 200e6
"""Bytes/s: a checkpoint of a 7B model is 98 GB with its optimizer, 8 minutes at this rate."""
FREE_DISK = 50 * GIB
TEST_BYTES = 128 * MIB


@dataclass(frozen=True)
class GpuState:
    """One GPU."""

    name: str
    free: int
    """Bytes."""
    total: int
    capability: tuple[int, int]


def gpus_here() -> list[GpuState]:
    """Those that torch can use; starts a CUDA context on each."""
    import torch

    return [gpu_state(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def gpu_state(index: int) -> GpuState:
    """Of one GPU; starts a CUDA context on it."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return GpuState(name, free, total, capability)


def gpu_lines(gpus: Sequence[GpuState], built_for: str | None, driver: bool) -> list[Line]:
    """built_for: the CUDA version of torch, None of a torch for CPUs; driver: whether nvidia-smi is there."""
    if not gpus:
        return [_no_gpu(built_for, driver)]
    return [gpu_line(f"GPU {index}", gpu) for index, gpu in enumerate(gpus)]


def gpu_line(name: str, gpu: GpuState) -> Line:
    """Of one GPU, by whatever name."""
    found = f"{gpu.name}, {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
    if gpu.capability < OLDEST_ARCHITECTURE:
        remedy = 'use an A100 or newer, or model.dtype = "float32"'
        found = f"{found}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        return Line(name, "fail", found, remedy)
    if gpu.free < FREE_SHARE * gpu.total:
        return Line(name, "warn", found, "end the processes that nvidia-smi shows on it")
    return Line(name, "ok", found)


def _no_gpu(built_for: str | None, driver: bool) -> Line:
    if driver and built_for is None:
        return Line(
            "GPUs",
            "fail",
            "a driver is there, but torch is built for CPUs alone",
            "pip install torch from the CUDA index",
        )
    if driver:
        remedy = "compare the driver's CUDA version in nvidia-smi, and CUDA_VISIBLE_DEVICES"
        return Line("GPUs", "fail", f"a driver is there, but torch for CUDA {built_for} sees no GPU", remedy)
    return Line("GPUs", "ok", "none: models run on the CPU")


def cuda_line(driver: tuple[int, int] | None, built_for: str | None) -> Line:
    """driver: the newest CUDA version (major, minor) that the GPU's driver runs, None without a driver; built_for:
    torch's. Within a major version older drivers run newer CUDA, except for kernels that are compiled from PTX
    (CUDA Compatibility, "Minor Version Compatibility")."""
    name = "CUDA driver"
    if driver is None or built_for is None:
        found = "no driver" if driver is None else f"runs CUDA {driver[0]}.{driver[1]}"
        return Line(name, "ok", f"{found}, and torch is {f'for CUDA {built_for}' if built_for else 'for CPUs'}")
    major, minor = (int(part) for part in built_for.split(".")[:2])
    found = f"runs CUDA up to {driver[0]}.{driver[1]}, torch is for {built_for}"
    if driver[0] < major:
        remedy = f"update the driver, add NVIDIA's cuda-compat-{major}-{minor}, or install torch for CUDA {driver[0]}"
        return Line(name, "fail", found, remedy)
    if driver[0] == major and driver[1] < minor:
        remedy = f"update the driver to one for CUDA {built_for}: kernels compiled at run time may not load"
        return Line(name, "warn", found, remedy)
    return Line(name, "ok", found)


def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA version that the driver runs; None without a driver. Starts no CUDA context."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def nccl_line(version: tuple[int, ...] | None) -> Line:
    """version: of the NCCL that torch brings; None without CUDA."""
    if version is None:
        return Line("NCCL", "ok", "not there, and of no use without a GPU")
    found = ".".join(str(part) for part in version)
    if version < (2, 18):
        return Line(
            "NCCL", "warn", f"{found}, older than 2.18", "install the NCCL that torch asks for (nvidia-nccl-cu*)"
        )
    return Line("NCCL", "ok", found)


def nccl_version() -> tuple[int, ...] | None:
    """Of the NCCL that torch uses."""
    import torch

    if not torch.cuda.is_available():
        return None
    from torch.cuda import nccl

    version: Any = nccl.version()
    return tuple(version)


def bubblewrap_line(path: str | None, error: str) -> Line:
    """path of bwrap, and why a sandbox could not be made (empty: it could)."""
    name, needed = "bubblewrap", "only programs that models write need it"
    if path is None:
        return Line(name, "warn", f"not installed; {needed}", "apt-get install bubblewrap")
    if error:
        remedy = "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, or a container option)"
        return Line(name, "warn", f"{path} cannot make a sandbox ({error}); {needed}", remedy)
    return Line(name, "ok", path)


def try_bubblewrap() -> tuple[str | None, str]:
    """What bubblewrap_line asks for."""
    path = shutil.which("bwrap")
    if path is None:
        return None, ""
    command = [path, "--unshare-all", "--ro-bind", "/", "/", "--", "/bin/true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return path, " ".join(str(error).split())
    return path, "" if done.returncode == 0 else " ".join(done.stderr.split()) or f"exit code {done.returncode}"


def host_memory_line(available: int, total: int, num_gpus: int) -> Line:
    """Bytes."""
    needed = HOST_GIB_A_GPU * GIB * num_gpus
    found = f"{available / GIB:.0f} of {total / GIB:.0f} GiB available"
    if available < needed:
        remedy = "leave actor.offload_optimizer and loss.kl_coefficient off, or take a node with more memory"
        return Line("host memory", "warn", f"{found}, {HOST_GIB_A_GPU} a GPU are advised", remedy)
    return Line("host memory", "ok", found)


def limit_lines(open_files: int, locked: int, on_gpu: bool) -> list[Line]:
    """Soft limits; resource.RLIM_INFINITY (-1): none."""
    lines = [_limit("open files", "-n", open_files, OPEN_FILES)]
    if on_gpu:
        # Page-locked host memory and RDMA both count.
        lines.append(_limit("locked memory", "-l", locked, resource.RLIM_INFINITY))
    return lines


def _limit(what: str, flag: str, found: int, needed: int) -> Line:
    name = f"ulimit {flag} ({what})"
    if found == resource.RLIM_INFINITY or (needed != resource.RLIM_INFINITY and found >= needed):
        return Line(name, "ok", "unlimited" if found == resource.RLIM_INFINITY else str(found))
    words = "unlimited" if needed == resource.RLIM_INFINITY else str(needed)
    return Line(
        name, "warn", f"{found}, advised is {words}", f"ulimit {flag} {words} before the run, or in the job's limits"
    )


@dataclass(frozen=True)
class Disk:
    """The file system of the run folders."""

    path: Path
    free: int
    """Bytes."""
    write_rate: float
    """Bytes/s of one file, up to the disk; 0: nothing could be written."""
    error: str = ""


def disk_line(disk: Disk) -> Line:
    """Free space and speed."""
    name = f"disk of {disk.path}"
    if disk.error:
        return Line(name, "fail", f"cannot be written: {disk.error}", "set run.dir to a folder that can")
    found = f"{disk.free / GIB:.0f} GiB free, writes {disk.write_rate / 1e6:.0f} MB/s"
    if disk.free < FREE_DISK:
        remedy = "free space, set run.dir to another disk, or lower checkpoint.keep"
        return Line(name, "warn", f"{found}; {FREE_DISK // GIB} GiB are advised", remedy)
    if disk.write_rate < WRITE_RATE:
        remedy = "set run.dir to a parallel or local file system, or raise checkpoint.every"
        return Line(name, "warn", f"{found}; {WRITE_RATE / 1e6:.0f} are advised", remedy)
    return Line(name, "ok", found)


def measure_disk(folder: Path, size: int = TEST_BYTES) -> Disk:
    """Write a file of `size` bytes to the disk under `folder` (or the nearest parent that exists) and delete it."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    file = place / f".riskpo_doctor_{socket.gethostname()}_{os.getpid()}"
    try:
        free = shutil.disk_usage(place).free
        if free < 2 * size:
            return Disk(place, free, 0.0)
        start = time.perf_counter()
        with file.open("wb") as out:
            block = os.urandom(MIB)
            for _ in range(size // MIB):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        return Disk(place, free, size / (time.perf_counter() - start))
    except OSError as error:
        return Disk(place, 0, 0.0, error.strerror or str(error))
    finally:
        file.unlink(missing_ok=True)
