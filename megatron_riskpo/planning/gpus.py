"""What GPUs can do, and how much of it a training run gets."""

from dataclasses import dataclass

from megatron_riskpo.observability.performance import DEVICE_PEAK_FLOPS, device_peak_flops

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU with an SXM socket, in a node of eight."""

    name: str
    memory: float
    """Bytes that CUDA offers."""
    peak_flops: float
    """FLOP/s of bfloat16 products, dense."""
    memory_rate: float
    """Bytes/s to its own memory."""
    link_rate: float
    """Bytes/s to the other GPUs of its node, one direction."""
    network_rate: float
    """Bytes/s to other nodes, one direction."""


GPUS: dict[str, Gpu] = {
    name.lower(): Gpu(name, memory * GIB, DEVICE_PEAK_FLOPS[name], rate, link, network)
    for name, memory, rate, link, network in (
        # Rates: the makers' data sheets. Network: one adapter a GPU, of 200 Gb/s beside an A100, else 400 Gb/s.
        ("A100", 79.2, 2.039e12, 300e9, 25e9),
        ("H100", 79.1, 3.35e12, 450e9, 50e9),
        ("H200", 139.8, 4.8e12, 450e9, 50e9),
        ("B200", 178.4, 8.0e12, 900e9, 50e9),
    )
}
"""By the name that `riskpo plan --gpu` takes."""


def gpu_named(device_name: str) -> Gpu | None:
    """The GPU by the name that CUDA gives it; None for others, PCIe boards among them."""
    peak = device_peak_flops(device_name)
    words = device_name.upper().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if peak is not None and name.upper() in words), None)


GPUS_A_NODE = 8

# Shares of the peak that real work gets. Assumed, until measured by this project (docs/gpu_results.md).
MATRIX_SHARE = 0.55
"""Of peak_flops, in the update's and the log-prob pass's linear layers of a dense model. Published runs of
Megatron-Core reach 0.4 to 0.5 end to end, communication included (arXiv 2205.05198, table 5), which is added here."""
EXPERT_MATRIX_SHARE = 0.3
"""The same with experts, whose products are smaller."""
PREFILL_SHARE = 0.5
"""Of peak_flops, while prompts are read."""
MEMORY_SHARE = 0.7
"""Of memory_rate, while weights and KV cache are read for decoding."""
LINK_SHARE = 0.7
"""Of link_rate and network_rate."""
DECODE_STEP_OVERHEAD = 3e-3
"""Seconds a decoded token beside the GPU's work: scheduling and sampling."""
FILE_RATE = 0.5e9
"""Bytes/s of a push to servers: from the GPU into a file in memory, summed on both sides, and back."""
GRADING_SECONDS = 0.02
"""Seconds to grade a response."""
MEAN_SHARE = 0.5
"""Of the longest allowed prompt and response, the mean: unless it is given."""

# Memory beside tensors.
CONTEXT_BYTES = round(1.5 * GIB)
"""CUDA context and NCCL's buffers, a process."""
TIGHT = 0.9
"""Of a GPU's memory: above it what the plan leaves out may be too much (longer packs of experts, another Adam)."""
FRAGMENTATION = 0.05
"""Of the activations: gaps between blocks of the allocator."""
ENGINE_WORKSPACE = 2 * GIB
"""Of vLLM's share of the GPU: its own activations and CUDA graphs."""
