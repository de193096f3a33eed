"""Llama 3 and DeepSeek-R1-Distill-Llama: no biases, frequencies scaled for long contexts (actor/rotary.py)."""

from megatron_riskpo.checkpoint.weight_map.base import Family
from megatron_riskpo.checkpoint.weight_map.blocks import ATTENTION, GATED_MLP, OUTER

LLAMA = Family(
    model_type="llama",
    layer_rules=(*ATTENTION, *GATED_MLP),
    outer_rules=OUTER,
    transformer_options=lambda hf_config: {},
    fixed={"attention_bias": (False, False), "mlp_bias": (False, False)},
)
