"""Which modules a transformer layer is made of: TransformerEngine's on CUDA where it is installed, else plain torch."""

from typing import Any, cast

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_riskpo.actor.attention import SDPACoreAttention
from megatron_riskpo.actor.norm import RMSNorm


def use_transformer_engine(dtype: torch.dtype) -> bool:
    """TransformerEngine needs a GPU, and 16 bits for packed sequences; without it the local modules do the same
    mathematics."""
    return torch.cuda.is_available() and HAVE_TE and dtype == torch.bfloat16


def block_spec(config: TransformerConfig, pp_rank: int, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (with virtual stages, of one of its chunks)."""
    if use_transformer_engine(config.params_dtype):
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, pp_rank=pp_rank, vp_stage=vp_stage)
    num_layers = get_num_layers_to_build(config, pp_rank=pp_rank, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[_local_layer_spec(config)] * num_layers, layer_norm=RMSNorm)


def _local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron's local layer with our core attention (packed sequences) and norm (sequence parallelism)."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    # Without TransformerEngine the name is never bound (megatron-core 0.16.1), and the router asks for it.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    layer = cast(TransformerLayerSubmodules, spec.submodules)
    attention: Any = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    for owner, names in (
        (layer, ("input_layernorm", "pre_mlp_layernorm")),
        (attention, ("q_layernorm", "k_layernorm")),
    ):
        for name in names:
            if getattr(owner, name) not in (None, IdentityOp):
                setattr(owner, name, RMSNorm)
    return spec
