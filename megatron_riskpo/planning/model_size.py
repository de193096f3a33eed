"""Parameters and KV cache of a whole model, from its config.json."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_riskpo.actor.flops import expert_width, num_experts
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of

BYTES = {"float32": 4, "bfloat16": 2}
"""Of a number, by model.dtype."""


def count_parameters(hf_config: Mapping[str, Any]) -> int:
    """Of the model as Hugging Face has it: without padding, tied embeddings once."""
    return outer_parameters(hf_config) + hf_config["num_hidden_layers"] * sum(layer_parameters(hf_config))


def outer_parameters(hf_config: Mapping[str, Any]) -> int:
    """Embedding, output layer and final norm."""
    hidden = hf_config["hidden_size"]
    tables = 1 if shape_of(hf_config).tied_embeddings else 2
    return tables * hf_config["vocab_size"] * hidden + hidden


def layer_parameters(hf_config: Mapping[str, Any]) -> tuple[int, int]:
    """Of one layer: those that every rank of an expert-parallel group has, and those of all its experts."""
    shape, hidden = shape_of(hf_config), hf_config["hidden_size"]
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    options = family_of(hf_config).transformer_options(hf_config)
    attention = hidden * (query + 2 * key) + query * hidden
    attention += query + 2 * key if options.get("add_qkv_bias") else 0
    attention += 2 * shape.head_dim if options.get("qk_layernorm") else 0
    norms, experts = 2 * hidden, num_experts(hf_config)
    if experts:
        return attention + norms + experts * hidden, experts * 3 * hidden * expert_width(hf_config)
    return attention + norms + 3 * hidden * hf_config["intermediate_size"], 0


def checkpoint_bytes(hf_config: Mapping[str, Any], dtype: str) -> int:
    """Of a training checkpoint: weights, AdamW's two moments in float32, and float32 main weights beside others."""
    main_weights = 0 if dtype == "float32" else BYTES["float32"]
    return count_parameters(hf_config) * (BYTES[dtype] + main_weights + 2 * BYTES["float32"])


def kv_bytes_per_token(hf_config: Mapping[str, Any], dtype: str, tp: int) -> int:
    """Of the KV cache on one of tp ranks; key-value heads are copied where there are fewer than ranks."""
    shape = shape_of(hf_config)
    heads = -(-shape.num_key_value_heads // tp)
    return 2 * shape.num_layers * heads * shape.head_dim * BYTES[dtype]


def largest_tensor(hf_config: Mapping[str, Any]) -> int:
    """Numbers in the largest tensor that is gathered whole for servers."""
    hidden, width = hf_config["hidden_size"], 2 * hf_config["intermediate_size"]
    return hidden * max(hf_config["vocab_size"], 0 if num_experts(hf_config) else width)


def _expert_share(hf_config: Mapping[str, Any], tp: int, expert_parallel: bool) -> float:
    """Of the experts, on the rank of an engine that has most: dealt out whole, some ranks may have one more."""
    experts = num_experts(hf_config)
    return -(-experts // tp) / experts if expert_parallel and experts else 1 / tp


def engine_parameters(hf_config: Mapping[str, Any], tp: int, *, expert_parallel: bool, chosen: float = 1.0) -> int:
    """On the rank of an engine that has most; of experts only the share that is `chosen`."""
    of_experts = hf_config["num_hidden_layers"] * layer_parameters(hf_config)[1]
    shared = count_parameters(hf_config) - of_experts
    return round(shared / tp + chosen * of_experts * _expert_share(hf_config, tp, expert_parallel))


def largest_module(hf_config: Mapping[str, Any], tp: int, *, expert_parallel: bool) -> int:
    """Numbers in the largest module on a rank of vLLM: a table, gate and up of a layer, or the rank's experts."""
    of_experts = layer_parameters(hf_config)[1] * _expert_share(hf_config, tp, expert_parallel)
    return round(max(largest_tensor(hf_config) / tp, of_experts))


def torch_dtype(name: str) -> torch.dtype:
    """Of model.dtype."""
    return getattr(torch, name)
