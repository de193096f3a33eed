"""FLOPs of a model against those that torch counts while transformers runs it.

torch's counter takes the products of eager attention as they are done, over all pairs of positions; causal attention
needs half of them. So it must count ours and the attention once more, to within the rotary angles, which transformers
makes by a product too.
"""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_riskpo.actor.flops import ModelFlops

SIZES = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2, no key-value groups": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 48},
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "head_dim": 16},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 32, **MIXTURE},
    "qwen3_moe, a dense layer": {"model_type": "qwen3_moe", "head_dim": 32, **MIXTURE, "mlp_only_layers": [0]},
    "qwen3_moe, every other": {"model_type": "qwen3_moe", "head_dim": 32, **MIXTURE, "decoder_sparse_step": 2},
}
LENGTH = 96


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backward", [False, True])
def test_as_many_as_torch_counts(name, backward):
    config = AutoConfig.for_model(**(SIZES | CONFIGS[name]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.arange(LENGTH)[None]).logits
        if backward:
            logits.sum().backward()
    for hf_config in (SIZES | CONFIGS[name], config.to_dict()):
        flops = ModelFlops.from_hf_config(hf_config)
        count = flops.forward_backward if backward else flops.forward
        other_half = (3 if backward else 1) * flops.per_squared_length * LENGTH**2
        assert counter.get_total_flops() == pytest.approx(count([LENGTH], LENGTH) + other_half, rel=1e-3)


def test_a_known_model():
    """Qwen2.5-7B: 7.6e9 parameters, of which 0.5e9 are the embedding, none of it a product."""
    flops = ModelFlops.from_hf_config({
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    })  # fmt: skip
    assert flops.forward([1], 1) == pytest.approx(2 * (7.6e9 - 0.5e9), rel=0.01)


def test_packed_sequences_attend_to_themselves_only():
    flops = ModelFlops(per_token=10.0, per_squared_length=1.0, per_target=100.0)
    assert flops.forward([3, 4], 5) == 7 * 10 + (9 + 16) + 5 * 100
    assert flops.forward_backward([3, 4], 5) == 3 * flops.forward([3, 4], 5)
    assert flops.forward([3, 4], 5) < flops.forward([7], 5)
