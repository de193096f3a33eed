"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: grouped-query attention with biases on q, k and v, gated SiLU MLP."""

from megatron_riskpo.checkpoint.weight_map.base import Family
from megatron_riskpo.checkpoint.weight_map.blocks import ATTENTION, GATED_MLP, OUTER, QKV_BIAS

QWEN2 = Family(
    model_type="qwen2",
    layer_rules=(*ATTENTION, *QKV_BIAS, *GATED_MLP),
    outer_rules=OUTER,
    transformer_options=lambda hf_config: {"add_qkv_bias": True},
    fixed={"use_sliding_window": (False, False)},
)
