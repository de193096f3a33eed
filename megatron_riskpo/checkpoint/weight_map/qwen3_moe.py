"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3 with experts in place of the MLP, in every layer."""

from collections.abc import Mapping
from typing import Any

from megatron_riskpo.actor.flops import num_experts
from megatron_riskpo.checkpoint.weight_map.base import Family
from megatron_riskpo.checkpoint.weight_map.blocks import ATTENTION, GATED_EXPERTS, OUTER, QK_NORM


def _options(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        "num_moe_experts": num_experts(hf_config),
        "moe_ffn_hidden_size": hf_config["moe_intermediate_size"],
        "moe_router_topk": hf_config["num_experts_per_tok"],
        # Probabilities over all experts, or (normalised) over the chosen ones: softmax before or after the choice.
        "moe_router_pre_softmax": not hf_config.get("norm_topk_prob", False),
        "moe_router_dtype": "fp32",
        # Pretraining's balance of experts is not an aim here: it would pull the policy off its objective.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    layer_rules=(*ATTENTION, *QK_NORM, *GATED_EXPERTS),
    outer_rules=OUTER,
    transformer_options=_options,
    fixed={
        "use_sliding_window": (False, False),
        "attention_bias": (False, False),
        "decoder_sparse_step": (1, 1),
        "mlp_only_layers": ([], []),
    },
)
