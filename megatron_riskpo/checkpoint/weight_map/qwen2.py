"""Qwen2 and Qwen2.5: rotary positions, grouped-query attention with biases on q, k and v, gated SiLU MLP."""

from megatron_riskpo.checkpoint.weight_map.base import QKV, SINGLE, STACKED, Family, Rule

_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."
_LAYER = "decoder.layers.{layer}."

QWEN2 = Family(
    model_type="qwen2",
    layer_rules=(
        Rule(_LAYER + "input_layernorm.weight", ("model.layers.{layer}.input_layernorm.weight",), None, SINGLE),
        Rule(
            _LAYER + "self_attention.linear_qkv.weight",
            tuple(_ATTENTION + f"{p}_proj.weight" for p in "qkv"),
            0,
            QKV,
        ),
        Rule(
            _LAYER + "self_attention.linear_qkv.bias",
            tuple(_ATTENTION + f"{p}_proj.bias" for p in "qkv"),
            0,
            QKV,
        ),
        Rule(_LAYER + "self_attention.linear_proj.weight", (_ATTENTION + "o_proj.weight",), 1, SINGLE),
        Rule(
            _LAYER + "pre_mlp_layernorm.weight",
            ("model.layers.{layer}.post_attention_layernorm.weight",),
            None,
            SINGLE,
        ),
        Rule(
            _LAYER + "mlp.linear_fc1.weight",
            (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
            0,
            STACKED,
        ),
        Rule(_LAYER + "mlp.linear_fc2.weight", (_MLP + "down_proj.weight",), 1, SINGLE),
    ),
    outer_rules=(
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), 0, SINGLE, is_vocab=True),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), None, SINGLE),
        Rule("output_layer.weight", ("lm_head.weight",), 0, SINGLE, is_vocab=True),
    ),
    transformer_options={"add_qkv_bias": True, "add_bias_linear": False, "gated_linear_unit": True},
)
