"""One table a model family; used by loading, export and bridge. To add a family: write its table, list it here."""

from collections.abc import Mapping
from typing import Any

from megatron_riskpo.actor.flops import num_experts
from megatron_riskpo.checkpoint.weight_map.base import Family, ModelShape
from megatron_riskpo.checkpoint.weight_map.llama import LLAMA
from megatron_riskpo.checkpoint.weight_map.mistral import MISTRAL
from megatron_riskpo.checkpoint.weight_map.mixtral import MIXTRAL
from megatron_riskpo.checkpoint.weight_map.qwen2 import QWEN2
from megatron_riskpo.checkpoint.weight_map.qwen3 import QWEN3
from megatron_riskpo.checkpoint.weight_map.qwen3_moe import QWEN3_MOE
from megatron_riskpo.errors import UsageError

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (QWEN2, QWEN3, QWEN3_MOE, LLAMA, MISTRAL, MIXTRAL)
}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config.json; UsageError names the known ones."""
    model_type = str(hf_config.get("model_type"))
    if model_type not in FAMILIES:
        raise UsageError(f"model_type {model_type!r} in config.json is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def head_dim_of(hf_config: Mapping[str, Any]) -> int:
    """Size of an attention head."""
    return hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"]


def shape_of(hf_config: Mapping[str, Any]) -> ModelShape:
    """The sizes that the weight rules need, from a Hugging Face config.json."""
    num_heads = hf_config["num_attention_heads"]
    return ModelShape(
        num_layers=hf_config["num_hidden_layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=hf_config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim_of(hf_config),
        vocab_size=hf_config["vocab_size"],
        tied_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        num_experts=num_experts(hf_config),
    )
