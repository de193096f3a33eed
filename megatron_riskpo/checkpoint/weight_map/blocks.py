"""What decoder families share: the rules, and Megatron settings, that a table is put together from."""

from collections.abc import Mapping
from typing import Any

from megatron_riskpo.actor.flops import expert_width, num_experts
from megatron_riskpo.checkpoint.weight_map.base import QKV, SINGLE, STACKED, Rule

_HF_LAYER = "model.layers.{layer}."
_LAYER = "decoder.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}."


def _whole(megatron: str, hf: str) -> Rule:
    """A parameter that every tensor-parallel rank has whole."""
    return Rule(_LAYER + megatron, (_HF_LAYER + hf,), None, SINGLE)


def _split(megatron: str, hf: str, shard_dim: int) -> Rule:
    return Rule(_LAYER + megatron, (_HF_LAYER + hf,), shard_dim, SINGLE)


def _qkv(kind: str) -> Rule:
    names = tuple(_HF_LAYER + f"self_attn.{p}_proj.{kind}" for p in "qkv")
    return Rule(_LAYER + f"self_attention.linear_qkv.{kind}", names, 0, QKV)


ATTENTION = (
    _whole("input_layernorm.weight", "input_layernorm.weight"),
    _qkv("weight"),
    _split("self_attention.linear_proj.weight", "self_attn.o_proj.weight", 1),
    _whole("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)
"""Pre-norm attention without biases."""

QKV_BIAS = (_qkv("bias"),)

QK_NORM = (
    _whole("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _whole("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)
"""A norm over the head dimension of queries and keys."""

GATED_MLP = (
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        0,
        STACKED,
    ),
    _split("mlp.linear_fc2.weight", "mlp.down_proj.weight", 1),
)


def gated_experts(router: str, expert: str, projections: tuple[str, str, str]) -> tuple[Rule, ...]:
    """A router and experts: Hugging Face's names within a layer, `expert` up to the projections (gate, up, down).

    Experts are dealt out to the expert-parallel ranks; what splits one is expert tensor parallelism.
    """
    gate, up, down = (f"{_HF_LAYER}{expert}{name}.weight" for name in projections)
    return (
        _whole("mlp.router.weight", f"{router}.weight"),
        Rule(_EXPERT + "linear_fc1.weight", (gate, up), 0, STACKED),
        Rule(_EXPERT + "linear_fc2.weight", (down,), 1, SINGLE),
    )


def moe_options(hf_config: Mapping[str, Any], *, normalized: bool) -> dict[str, Any]:
    """Arguments of Megatron's TransformerConfig; `normalized`: the chosen experts' probabilities sum to 1."""
    return {
        "num_moe_experts": num_experts(hf_config),
        "moe_ffn_hidden_size": expert_width(hf_config),
        "moe_router_topk": hf_config["num_experts_per_tok"],
        # Softmax over all experts before the choice, or over the chosen ones after it.
        "moe_router_pre_softmax": not normalized,
        "moe_router_dtype": "fp32",
        # Pretraining's balance of experts is not an aim here: it would pull the policy off its objective.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


OUTER = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), 0, SINGLE, is_vocab=True),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), None, SINGLE),
    Rule("output_layer.weight", ("lm_head.weight",), 0, SINGLE, is_vocab=True),
)
"""Embedding, final norm, output layer."""
