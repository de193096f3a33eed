"""Under which key, and in which slice of it, a torch_dist checkpoint of Megatron has a parameter of the tables.

Megatron stacks the layers of a model, and the experts of a layer, along leading dimensions, and calls fused modules
alike whether they are fused or not.
"""

from megatron_riskpo.checkpoint.weight_map.base import Rule

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""TransformerEngine's name of a norm that is fused with the linear layer after it, and the tables' name."""

_FUSED_NAME = {name: fused for fused, name in FUSED_NORMS.items()}
_LAYER, _EXPERT = "{layer}.", "local_experts.{expert}."


def stored_keys(template: Rule) -> tuple[str, ...]:
    """The keys under which the parameter may be; the first is how this project's actor on a CPU stores it.

    A norm has the fused name, but before experts under TransformerEngine, where there is nothing to fuse it with.
    """
    key = template.megatron.replace(_LAYER, "").replace(_EXPERT, "experts.")
    plain = next((name for name in _FUSED_NAME if key.endswith(name)), None)
    return (key,) if plain is None else (key.removesuffix(plain) + _FUSED_NAME[plain], key)


def stored_index(template: Rule, layer: int, expert: int | None) -> tuple[int, ...]:
    """The slice's place along the leading dimensions."""
    if _LAYER not in template.megatron:
        return ()
    return (layer,) if expert is None else (layer, expert)


def stored_counts(template: Rule, num_layers: int, num_experts: int) -> tuple[int, ...]:
    """The sizes of the leading dimensions."""
    if _LAYER not in template.megatron:
        return ()
    return (num_layers, num_experts) if template.is_expert else (num_layers,)
