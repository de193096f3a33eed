"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3 with experts in place of the MLP, in every layer."""

from collections.abc import Mapping
from typing import Any

from megatron_riskpo.checkpoint.weight_map.base import Family
from megatron_riskpo.checkpoint.weight_map.blocks import ATTENTION, OUTER, QK_NORM, gated_experts, moe_options


def _options(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_layernorm": True, **moe_options(hf_config, normalized=hf_config.get("norm_topk_prob", False))}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    layer_rules=(
        *ATTENTION,
        *QK_NORM,
        *gated_experts("mlp.gate", "mlp.experts.{expert}.", ("gate_proj", "up_proj", "down_proj")),
    ),
    outer_rules=OUTER,
    transformer_options=_options,
    fixed={
        "use_sliding_window": (False, False),
        "attention_bias": (False, False),
        "decoder_sparse_step": (1, 1),
        "mlp_only_layers": ([], []),
    },
)
