"""The CPU backend is scoped to megatron.core: torch itself stays as it is, and what cannot work is refused."""

import pytest
import torch

from megatron_riskpo.distributed import cpu_backend
from megatron_riskpo.errors import UsageError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend does nothing where CUDA is")


def test_megatron_sees_the_cpu_as_its_accelerator_and_torch_does_not_change():
    from megatron.core.pipeline_parallel import schedules

    assert schedules.torch is not torch
    assert schedules.torch.cuda.current_device() == torch.device("cpu")
    assert schedules.torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert schedules.torch.nn is torch.nn
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_optimizers_see_cuda_type_strings_only_inside():
    with cpu_backend._cuda_type_strings():
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(2).type(torch.float64).dtype == torch.float64
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_interleaved_stages_with_batched_p2p_are_refused():
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Stage:
        config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)

    with pytest.raises(RuntimeError, match="overlap_p2p_comm=True and batch_p2p_comm=False"):
        schedules.forward_backward_pipelining_with_interleaving(model=[Stage(), Stage()])


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_backend, "TESTED_MEGATRON_VERSION", "0.0.1")
    with pytest.raises(UsageError, match=r"knows megatron-core 0\.0\.1, found .*pip install"):
        cpu_backend._check_version()
