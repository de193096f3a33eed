"""What the device at hand can do: the rates of a large matrix product and of a large copy, measured.

Beside them a figure says how much of the machine it used, whatever the card's clock and power limit are.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

REPEATS = 20


@dataclass(frozen=True)
class Ceilings:
    """Medians over repeated calls."""

    matrix_flops: float
    """FLOP/s of a square product, a multiply-add as two."""
    copy_bytes: float
    """Bytes a second of device memory, read and written ones added."""


def the_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """For the report: which device, and which software."""
    about: dict[str, Any] = {"device": "cpu", "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"device": properties.name, "memory_gib": properties.total_memory / 2**30}
    return about


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], device: torch.device, repeats: int, warmup: int = 2) -> list[float]:
    """Seconds of each call, the device's work included."""
    seconds = []
    for _ in range(warmup + repeats):
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def measure_ceilings(device: torch.device, dtype: torch.dtype, small: bool) -> Ceilings:
    """small: sizes that a CPU is through with at once."""
    size, num_bytes = (256, 2**20) if small else (8192, 2**32)
    ceilings = Ceilings(_matrix_rate(device, dtype, size), _copy_rate(device, num_bytes))
    if device.type == "cuda":
        # What comes next shall find the memory free.
        torch.cuda.empty_cache()
    return ceilings


def _matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / median(time_calls(lambda: torch.mm(left, right, out=out), device, REPEATS))


def _copy_rate(device: torch.device, num_bytes: int) -> float:
    source = torch.zeros(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / median(time_calls(lambda: target.copy_(source), device, REPEATS))
