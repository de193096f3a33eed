"""Mixtral: Mistral's attention, and experts whose probabilities are normalised over the chosen ones."""

from megatron_riskpo.checkpoint.weight_map.base import Family
from megatron_riskpo.checkpoint.weight_map.blocks import ATTENTION, OUTER, gated_experts, moe_options

MIXTRAL = Family(
    model_type="mixtral",
    layer_rules=(
        *ATTENTION,
        *gated_experts("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2")),
    ),
    outer_rules=OUTER,
    transformer_options=lambda hf_config: moe_options(hf_config, normalized=True),
    # What a config.json without the option means is full attention; the first release's has a window of 4096 tokens.
    fixed={"sliding_window": (None, None)},
)
