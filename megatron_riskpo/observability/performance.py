"""How much of what a device can do the update makes of it."""

import re
from collections.abc import Sequence

import torch

from megatron_riskpo.actor.flops import ModelFlops

DEVICE_PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""FLOP/s of bfloat16 products without sparsity, of the boards with SXM sockets: the makers' data sheets."""


def device_peak_flops(name: str) -> float | None:
    """FLOP/s of a GPU by the name that CUDA gives it; None where it is not known. H100 and H200 come as PCIe and NVL
    boards too, which are slower, and in one package with a CPU (GH200), under a name of its own."""
    words = re.split(r"[\s\-]+", name.upper())
    model = next((word for word in words if word in DEVICE_PEAK_FLOPS), None)
    if model is None or (model != "A100" and {"PCIE", "NVL"} & set(words)):
        return None
    return DEVICE_PEAK_FLOPS[model]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of the device that a rank runs on, in bfloat16; None on a CPU, for another dtype and an unknown GPU."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return device_peak_flops(torch.cuda.get_device_name(device))


def update_metrics(
    flops: ModelFlops, lengths: Sequence[int], num_targets: int, seconds: float, num_ranks: int, peak: float | None
) -> dict[str, float]:
    """perf/* of one pass forward and backward over sequences of the given lengths (prompt and response, in tokens).

    perf/update_tokens_per_second: of all ranks together. perf/model_tflops: 10^12 model FLOP/s a rank. perf/mfu: its
    share of the device's peak, where that is known.
    """
    achieved = flops.forward_backward(lengths, num_targets) / seconds / num_ranks
    metrics = {"perf/update_tokens_per_second": sum(lengths) / seconds, "perf/model_tflops": achieved / 1e12}
    return metrics | ({"perf/mfu": achieved / peak} if peak else {})
