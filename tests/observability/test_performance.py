"""perf/* by hand, and the peaks of boards by the names that drivers give them."""

import pytest
import torch

from megatron_riskpo.actor.flops import ModelFlops
from megatron_riskpo.observability.performance import device_peak_flops, peak_flops, update_metrics

FLOPS = ModelFlops(per_token=4e9, per_squared_length=1e6, per_target=1e9)


def test_by_hand():
    metrics = update_metrics(FLOPS, [1000, 3000], num_targets=3500, seconds=2.0, num_ranks=4, peak=100e12)
    done = 3 * (4000 * 4e9 + (1000**2 + 3000**2) * 1e6 + 3500 * 1e9)
    assert metrics == pytest.approx(
        {
            "perf/update_tokens_per_second": 2000,
            "perf/model_tflops": done / 2 / 4 / 1e12,
            "perf/mfu": done / 2 / 4 / 100e12,
        }
    )


def test_no_share_of_an_unknown_peak():
    metrics = update_metrics(FLOPS, [10], num_targets=5, seconds=1.0, num_ranks=1, peak=None)
    assert set(metrics) == {"perf/update_tokens_per_second", "perf/model_tflops"}
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_of_boards(name, peak):
    assert device_peak_flops(name) == peak


def test_only_a_gpu_in_bfloat16_has_a_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda", 0)
    assert peak_flops(device, torch.bfloat16) == 989e12
    assert peak_flops(device, torch.float32) is None
