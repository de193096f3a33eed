"""From a Hugging Face config.json to Megatron's TransformerConfig."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_riskpo.actor.architecture import check_architecture
from megatron_riskpo.actor.specs import use_transformer_engine
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.config import ActorConfig


def transformer_config(hf_config: dict[str, Any], actor: ActorConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's description of the model under this run's layout; UsageError for a model that it cannot compute."""
    check_architecture(hf_config)
    family, shape = family_of(hf_config), shape_of(hf_config)
    on_gpu, has_te = torch.cuda.is_available(), use_transformer_engine(dtype)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=hf_config["hidden_size"],
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=hf_config["intermediate_size"],
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.get("rms_norm_eps", 1e-6),
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=hf_config.get("initializer_range", 0.02),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True,
        # The loss arrives normalised over the global mini-batch: gradients are summed, never averaged.
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        # Fused kernels are CUDA only (or go through torch.compile, which a CPU test must not wait for).
        masked_softmax_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        # Unfused, each layer would ask the GPU for every sequence's length.
        apply_rope_fusion=has_te,
        persist_layer_norm=on_gpu,
        gradient_accumulation_fusion=False,
        moe_grouped_gemm=has_te and shape.num_experts > 0,
        **_layout_options(actor, dtype),
        **_RECOMPUTE[actor.recompute],
        **family.transformer_options(hf_config),
    )


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _layout_options(actor: ActorConfig, dtype: torch.dtype) -> dict[str, Any]:
    interleaved = actor.vp > 1
    return {
        "tensor_model_parallel_size": actor.tp,
        "pipeline_model_parallel_size": actor.pp,
        "virtual_pipeline_model_parallel_size": actor.vp if interleaved else None,
        # Interleaved stages exchange several tensors with the same peer. Put into one batch, gloo matches them in
        # another order and gradients are silently wrong; sent one by one they are right.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "num_layers_in_first_pipeline_stage": actor.first_stage_layers or None,
        "num_layers_in_last_pipeline_stage": actor.last_stage_layers or None,
        "context_parallel_size": actor.cp,
        "expert_model_parallel_size": actor.ep,
        "expert_tensor_parallel_size": actor.etp,
        "sequence_parallel": actor.sequence_parallel,
        # Packed micro-batches differ in length, so pipeline stages have to tell each other the shapes.
        "variable_seq_lengths": actor.pp > 1,
        # Dropless; what Megatron asks for beside variable_seq_lengths, of dense models too.
        "moe_token_dispatcher_type": "alltoall",
        "pipeline_dtype": dtype,
    }
