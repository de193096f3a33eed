"""Mistral (7B from v0.2 on, Small, Nemo): Llama's layers with full attention and a head dimension of its own."""

from megatron_riskpo.checkpoint.weight_map.base import Family
from megatron_riskpo.checkpoint.weight_map.blocks import ATTENTION, GATED_MLP, OUTER

MISTRAL = Family(
    model_type="mistral",
    layer_rules=(*ATTENTION, *GATED_MLP),
    outer_rules=OUTER,
    transformer_options=lambda hf_config: {},
    # The first release's window of 4096 tokens is also what a config.json without the option means.
    fixed={"sliding_window": (None, 4096)},
)
