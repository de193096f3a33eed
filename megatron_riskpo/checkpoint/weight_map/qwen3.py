"""Qwen3: no biases, norms on queries and keys, a head dimension of its own."""

from megatron_riskpo.checkpoint.weight_map.base import Family
from megatron_riskpo.checkpoint.weight_map.blocks import ATTENTION, GATED_MLP, OUTER, QK_NORM

QWEN3 = Family(
    model_type="qwen3",
    layer_rules=(*ATTENTION, *QK_NORM, *GATED_MLP),
    outer_rules=OUTER,
    transformer_options=lambda hf_config: {"qk_layernorm": True},
    fixed={"use_sliding_window": (False, False), "attention_bias": (False, False)},
)
