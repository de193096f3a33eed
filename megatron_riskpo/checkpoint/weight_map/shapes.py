"""Shapes of the Hugging Face tensors of a model, from config.json alone."""

from collections.abc import Mapping
from typing import Any

from megatron_riskpo.actor.flops import expert_width
from megatron_riskpo.checkpoint.weight_map import shape_of
from megatron_riskpo.checkpoint.weight_map.base import Rule

Shape = tuple[int, ...]


def hf_shapes(rule: Rule, hf_config: Mapping[str, Any]) -> list[Shape]:
    """Of the tensors that `rule.hf` names, in that order. Raises KeyError for a parameter not listed here."""
    by_ending = _shapes_by_ending(hf_config)
    name = rule.megatron
    if ".local_experts." in name:
        name = "experts." + ".".join(name.split(".")[-2:])
    ending = next((ending for ending in by_ending if name.endswith(ending)), None)
    if ending is None:
        raise KeyError(f"{rule.megatron}: no shape is known for it; add it to weight_map/shapes.py")
    return by_ending[ending]


def _shapes_by_ending(hf_config: Mapping[str, Any]) -> dict[str, list[Shape]]:
    """By the end of Megatron's name, the longer endings first."""
    shape = shape_of(hf_config)
    hidden, width, of_expert = hf_config["hidden_size"], hf_config["intermediate_size"], expert_width(hf_config)
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return {
        "experts.linear_fc1.weight": [(of_expert, hidden)] * 2,
        "experts.linear_fc2.weight": [(hidden, of_expert)],
        "mlp.router.weight": [(shape.num_experts, hidden)],
        "mlp.linear_fc1.weight": [(width, hidden)] * 2,
        "mlp.linear_fc2.weight": [(hidden, width)],
        "linear_qkv.weight": [(query, hidden), (key, hidden), (key, hidden)],
        "linear_qkv.bias": [(query,), (key,), (key,)],
        "linear_proj.weight": [(hidden, query)],
        "q_layernorm.weight": [(shape.head_dim,)],
        "k_layernorm.weight": [(shape.head_dim,)],
        "layernorm.weight": [(hidden,)],
        "word_embeddings.weight": [(shape.vocab_size, hidden)],
        "output_layer.weight": [(shape.vocab_size, hidden)],
    }
