"""Whether the actor computes a model as its config.json means it."""

from collections.abc import Mapping
from typing import Any

from megatron_riskpo.actor.flops import num_experts
from megatron_riskpo.actor.rotary import rotary_frequencies
from megatron_riskpo.checkpoint.weight_map import family_of, head_dim_of
from megatron_riskpo.errors import UsageError


def check_architecture(hf_config: Mapping[str, Any]) -> None:
    """Raise UsageError for what the family's Megatron form would silently compute differently."""
    family = family_of(hf_config)
    if hf_config.get("hidden_act", "silu") != "silu":
        raise UsageError(f"config.json: hidden_act {hf_config['hidden_act']!r} is not supported; only 'silu' is")
    message = family.refusal(hf_config)
    if message:
        raise UsageError(message)
    if any(rule.is_expert for rule in family.layer_rules) and not num_experts(hf_config):
        raise UsageError(f"config.json: {family.model_type} has no num_experts (or num_local_experts)")
    rotary_frequencies(hf_config, head_dim_of(hf_config))
