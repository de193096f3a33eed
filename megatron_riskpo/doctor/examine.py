"""All of `riskpo doctor`'s lines for the machine at hand."""

import resource
import shutil
import warnings
from pathlib import Path

from megatron_riskpo.doctor import machine
from megatron_riskpo.doctor.line import Line
from megatron_riskpo.doctor.packages import package_lines


def examine(run_dir: Path) -> list[Line]:
    """Packages first: the others need torch."""
    try:
        import torch
    except (ImportError, OSError):
        return package_lines(on_gpu=False)
    gpus = machine.gpus_here()
    return [
        *node_lines(len(gpus)),
        *machine.gpu_lines(gpus, torch.version.cuda, driver=shutil.which("nvidia-smi") is not None),
        machine.disk_line(machine.measure_disk(run_dir)),
    ]


def node_lines(num_gpus: int) -> list[Line]:
    """Packages, libraries and limits of this machine, whatever its GPUs and disks: `num_gpus` are used of it."""
    import psutil
    import torch

    warnings.simplefilter("ignore")
    memory = psutil.virtual_memory()
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return [
        *package_lines(on_gpu=num_gpus > 0),
        machine.cuda_line(machine.cuda_of_driver(), torch.version.cuda),
        machine.nccl_line(machine.nccl_version()),
        machine.bubblewrap_line(*machine.try_bubblewrap()),
        machine.host_memory_line(memory.available, memory.total, num_gpus),
        *machine.limit_lines(open_files, locked, on_gpu=num_gpus > 0),
    ]
