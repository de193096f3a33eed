"""What an in-process vLLM needs from its process, and what it must not leave behind there.

Measured with vLLM 0.32: building an engine seeds every RNG, on the CPU replaces torch.set_num_threads by a no-op,
and writes LD_PRELOAD and LOCAL_WORLD_SIZE into the environment of all later child processes.
"""

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist

from megatron_riskpo.errors import UsageError

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_DEFAULTS = {
    # The engine runs in this process: with engine processes of its own the weights would have to be serialised.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    **_QUIET,
}
_SERVER_DEFAULTS = {
    # The endpoints that pause a server and give it weights.
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    **_QUIET,
}
_CHILD_VARIABLES = ("LD_PRELOAD", "LOCAL_WORLD_SIZE")


def prepare_environment(rank: int) -> None:
    """Set the environment variables that vLLM reads, where the user has not; call it before vLLM is imported."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise UsageError(
            "VLLM_ENABLE_V1_MULTIPROCESSING is set to "
            f"{os.environ['VLLM_ENABLE_V1_MULTIPROCESSING']!r}, but the engine has to run in this process: unset it"
        )
    # vLLM's external_launcher reads both, also when the default process group is there already.
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device()) if torch.cuda.is_available() else "0")


def prepare_server_environment() -> None:
    """The same for a server, whose engine has a process of its own."""
    for name, value in _SERVER_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        # vLLM compiles one line of its sampler (the rank of a token) at the first call: 3 to 36 s and a C++ compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def import_vllm() -> ModuleType:
    """vLLM, or UsageError that says how to get it."""
    try:
        import vllm
    except (ImportError, RuntimeError) as error:  # a torchvision of another build raises RuntimeError
        reason = " ".join(str(error).split())
        raise UsageError(
            f'rollout.engine = "vllm", but vLLM cannot be imported ({reason}): run `make install`, or '
            '`pip install "megatron-riskpo[cuda]"` on GPUs, or set rollout.engine = "megatron", which needs nothing'
        ) from error
    return vllm


@contextlib.contextmanager
def without_import_noise() -> Iterator[None]:
    """vLLM's imports, many of them while the engine is built, set off deprecation warnings of torch and the news
    that a CPU has no Triton."""
    logger = logging.getLogger("torch._library.triton")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Give torch's, numpy's and Python's global generators their states back: vLLM draws from them even when
    every request has a seed of its own."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextlib.contextmanager
def preserved_process_state() -> Iterator[None]:
    """Around engine construction: RNG states, torch.set_num_threads, number of threads, environment of children."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    variables = {name: os.environ.get(name) for name in _CHILD_VARIABLES}
    try:
        with preserved_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def kept_default_group() -> Iterator[None]:
    """vLLM's shutdown ends with a bare destroy_process_group(), which would take the trainer's groups with it;
    inside this context that one call does nothing, groups passed explicitly are still destroyed."""
    destroy = dist.destroy_process_group

    def destroy_explicit(group: dist.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = destroy_explicit
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
