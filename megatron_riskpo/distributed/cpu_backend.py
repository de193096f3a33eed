"""Unmodified megatron-core on a machine without CUDA.

Megatron-Core names the accelerator "cuda" throughout. Without CUDA, `install()` makes its modules see a `torch`
in which the accelerator is the CPU: an import hook hands every `megatron.core` module a proxy right after its
body ran. torch itself stays as it is for everybody else (vLLM and transformers live in the same process), but
for `Tensor.type()` inside four optimizer callables that compare type strings, and `Tensor.cuda()`, which
cannot work here anyway.

Why each substitution is safe:
- device handles: Megatron uses `torch.cuda.current_device()` and "cuda" only as `device=` arguments;
- streams and events: operations on the CPU are synchronous, so a stream orders nothing;
- the CUDA RNG: on the CPU dropout draws from torch's default generator, so that is the state to fork.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_riskpo.errors import UsageError

TESTED_MEGATRON_VERSION = "0.16.1"
CPU = torch.device("cpu")
FACTORIES = (
    *("tensor", "as_tensor", "arange", "zeros", "ones", "empty", "full", "rand", "randn"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
)


class NullStream:
    """Stands for a CUDA stream or event: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "NullStream":
        return self

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True


def _on_cpu(factory: Callable) -> Callable:
    """A tensor factory whose "cuda" means the CPU; pinning is a transfer hint without a meaning here."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapper


class _CudaProxy(types.ModuleType):
    Stream = Event = NullStream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchProxy(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _make_torch_proxy() -> types.ModuleType:
    cuda: Any = _CudaProxy("torch.cuda")
    stream = NullStream()
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed) and None
    proxy: Any = _TorchProxy("torch")
    proxy.cuda = cuda
    for name in FACTORIES:
        setattr(proxy, name, _on_cpu(getattr(torch, name)))
    return proxy


@contextlib.contextmanager
def _cuda_type_strings() -> Iterator[None]:
    """Inside, `tensor.type()` of a CPU tensor reads 'torch.cuda.*': Megatron's optimizers use it as a dtype test."""
    plain = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = plain(self, *args, **kwargs)
        if args or kwargs or named.startswith("torch.cuda."):
            return named
        return named.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = plain  # type: ignore[method-assign]


def _with_cuda_type_strings(owner: Any, name: str) -> None:
    raw = vars(owner)[name]
    function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_strings():
            return function(*args, **kwargs)

    setattr(owner, name, type(raw)(wrapper) if isinstance(raw, classmethod | staticmethod) else wrapper)


def _refuse_batched_interleaving(schedules: Any) -> None:
    """Interleaved pipeline stages with batched p2p give silently wrong gradients on gloo: several sends between
    the same two ranks go into one batch, and gloo matches them in another order."""
    interleaved = schedules.forward_backward_pipelining_with_interleaving

    @functools.wraps(interleaved)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        model = kwargs["model"]
        config = schedules.get_model_config(model[0] if isinstance(model, list) else model)
        if config.batch_p2p_comm or not config.overlap_p2p_comm:
            raise RuntimeError(
                "virtual pipeline stages on gloo with batched p2p give wrong gradients; "
                "set overlap_p2p_comm=True and batch_p2p_comm=False"
            )
        return interleaved(*args, **kwargs)

    schedules.forward_backward_pipelining_with_interleaving = wrapper


def _adapt_rng(random: Any) -> None:
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # The tracker warns when the CPU generator moves under it; here that generator IS the tracked one.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _adapt_experts(moe_utils: Any) -> None:
    move = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(move)
    def move_or_convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # A tensor that is on the CPU already was meant to be a numpy array too: split sizes have to be a list.
        moved = move(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    moe_utils.maybe_move_tensor_to_cpu = move_or_convert


def _adapt_mappings(mappings: Any) -> None:
    """gloo gathers and scatters equal parts only. Uneven ones, of the tokens whose experts are split over ranks, go by
    all-to-all: each rank sends its part to all of them, or adds up what it gets."""
    gather_even, scatter_even = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @functools.wraps(gather_even)
    def gather(part: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return gather_even(part, group, sizes, use_global_buffer)
        whole = part.new_empty(sum(sizes), *part.shape[1:])
        copies = torch.cat([part] * group.size())
        dist.all_to_all_single(whole, copies, sizes, [len(part)] * group.size(), group=group)
        return whole

    @functools.wraps(scatter_even)
    def scatter(whole: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return scatter_even(whole, group, sizes, use_global_buffer)
        parts = whole.new_empty(group.size(), sizes[group.rank()], *whole.shape[1:])
        own = [parts.size(1)] * group.size()
        dist.all_to_all_single(parts.flatten(0, 1), whole.contiguous(), own, sizes, group=group)
        return parts.sum(0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter


def _adapt(module: Any, torch_proxy: types.ModuleType) -> None:
    """Adapt one megatron.core module whose body has just run."""
    if vars(module).get("torch") is torch:
        module.torch = torch_proxy
    match module.__name__.removeprefix("megatron.core."):
        case "jit":
            # Decorating alone loads torch's whole compiler, a third of a process's start; the decorated functions
            # would be built by a C++ compiler at their first call.
            module.disable_jit_fuser()
        case "tensor_parallel.random":
            _adapt_rng(module)
        case "pipeline_parallel.schedules":
            _refuse_batched_interleaving(module)
        case "tensor_parallel.mappings":
            _adapt_mappings(module)
        case "transformer.moe.moe_utils":
            _adapt_experts(module)
        case "optimizer.distrib_optimizer":
            _with_cuda_type_strings(module.DistributedOptimizer, "_build_model_and_main_param_groups")
            _with_cuda_type_strings(module.DistributedOptimizer, "__init__")
        case "optimizer.optimizer":
            _with_cuda_type_strings(module.Float16OptimizerWithFloat16Params, "__init__")
        case "optimizer.clip_grads":
            _with_cuda_type_strings(module, "clip_grad_by_total_norm_fp32")


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.torch_proxy = _make_torch_proxy()

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "megatron.core" and not name.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        run_body = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            run_body(module)
            _adapt(module, self.torch_proxy)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _check_version() -> None:
    from importlib.metadata import version

    found = version("megatron-core")
    if found != TESTED_MEGATRON_VERSION:
        raise UsageError(
            f"the CPU backend knows megatron-core {TESTED_MEGATRON_VERSION}, found {found}; "
            f"pip install megatron-core=={TESTED_MEGATRON_VERSION}"
        )


def install() -> None:
    """Call before the first `import megatron.core`. Does nothing where CUDA is available, or when called again.

    Raises UsageError for another megatron-core version, RuntimeError when megatron.core is already imported.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    _check_version()
    if any(name.startswith("megatron.core.") for name in sys.modules):
        raise RuntimeError("cpu_backend.install() must run before megatron.core is imported")
    # Megatron calls .cuda() on small tensors; without CUDA the method could only raise.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    sys.meta_path.insert(0, _MegatronFinder())
