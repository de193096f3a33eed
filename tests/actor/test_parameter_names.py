"""A rank's parameters, however Megatron's modules call them, have the names of the weight tables: on the second of two
pipeline stages, and on the second of two expert-parallel ranks. The modules are stand-ins with the names that Megatron
gives under TransformerEngine and without it. Not tested here: TransformerEngine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_riskpo.actor.model import named_parameters
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of

NUM_LAYERS, NUM_EXPERTS, EP = 4, 8, 2
LAYERS = [2, 3]
"""Of the stage, counted over the model."""
EXPERTS = [4, 5, 6, 7]
"""Of the rank."""
COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "tie_word_embeddings": False,
}  # fmt: skip
DENSE = COMMON | {"model_type": "qwen2"}
MOE = COMMON | {"model_type": "qwen3_moe", "num_experts": NUM_EXPERTS, "num_experts_per_tok": 2,
                "moe_intermediate_size": 32}  # fmt: skip
ATTENTION = ["linear_qkv.weight", "linear_proj.weight"]
FUSED = "linear_qkv.layer_norm_weight"
OUTER = ["decoder.final_layernorm.weight", "output_layer.weight"]

DENSE_LAYER = [f"self_attention.{name}" for name in (*ATTENTION, "linear_qkv.bias")]
DENSE_LAYER += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
MOE_LAYER = [f"self_attention.{name}" for name in (*ATTENTION, "q_layernorm.weight", "k_layernorm.weight")]
MOE_LAYER += ["mlp.router.weight", "pre_mlp_layernorm.weight"]
LAYER_NAMES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dense": (DENSE, [*DENSE_LAYER, "input_layernorm.weight", "pre_mlp_layernorm.weight"]),
    "dense, fused norms": (DENSE, [*DENSE_LAYER, f"self_attention.{FUSED}", "mlp.linear_fc1.layer_norm_weight"]),
    "experts one by one": (MOE, [
        *MOE_LAYER, "input_layernorm.weight",
        *(f"mlp.experts.local_experts.{local}.linear_fc{of}.weight" for local in range(4) for of in (1, 2)),
    ]),
    "grouped experts, fused norms": (MOE, [
        *MOE_LAYER, f"self_attention.{FUSED}",
        *(f"mlp.experts.linear_fc{of}.weight{local}" for local in range(4) for of in (1, 2)),
    ]),
}  # fmt: skip


class StandIn:
    """The second stage, in one chunk, on the second expert-parallel rank; each parameter has its place in `names`."""

    def __init__(self, names: list[str]) -> None:
        layers = [SimpleNamespace(layer_number=layer + 1) for layer in LAYERS]
        self.decoder = SimpleNamespace(layers=layers)
        self.config = SimpleNamespace(num_moe_experts=NUM_EXPERTS, expert_model_parallel_size=EP)
        self.pg_collection = SimpleNamespace(ep=SimpleNamespace(rank=lambda: 1))
        self._named = [(name, nn.Parameter(torch.tensor(float(place)))) for place, name in enumerate(names)]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self._named


def names_of(layer_names: list[str]) -> list[str]:
    return [*(f"decoder.layers.{index}.{name}" for index in range(len(LAYERS)) for name in layer_names), *OUTER]


def tables_names(hf_config: dict[str, Any]) -> set[str]:
    """Those that the stage and the rank have."""
    shape, found = shape_of(hf_config), set(OUTER)
    for template, layer in family_of(hf_config).templates(shape):
        if layer in LAYERS:
            experts = EXPERTS if template.is_expert else [None]
            found |= {template.at(layer, expert).megatron for expert in experts}
    return found


@pytest.mark.parametrize("kind", LAYER_NAMES)
def test_names_are_those_of_the_tables(kind):
    hf_config, layer_names = LAYER_NAMES[kind]
    given = names_of(layer_names)
    found = dict(named_parameters([StandIn(given)]))  # type: ignore[list-item]
    assert set(found) == tables_names(hf_config)
    assert len(found) == len(given)


def test_each_name_is_its_own_parameters():
    given = names_of(LAYER_NAMES["grouped experts, fused norms"][1])
    found = {name: given[int(value)] for name, value in named_parameters([StandIn(given)])}  # type: ignore[list-item]
    expected = {
        "3.mlp.experts.local_experts.7.linear_fc1.weight": "1.mlp.experts.linear_fc1.weight3",
        "2.mlp.experts.local_experts.4.linear_fc2.weight": "0.mlp.experts.linear_fc2.weight0",
        "3.input_layernorm.weight": "1.self_attention.linear_qkv.layer_norm_weight",
        "2.mlp.router.weight": "0.mlp.router.weight",
    }
    for name, of in expected.items():
        assert found[f"decoder.layers.{name}"] == f"decoder.layers.{of}"
