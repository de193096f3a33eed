"""From a Hugging Face config.json to Megatron's TransformerConfig."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.config import ActorConfig
from megatron_riskpo.errors import UsageError


def rope_base(hf_config: dict[str, Any]) -> float:
    """Base of the rotary frequencies; transformers 5 writes it in rope_parameters, earlier ones beside."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UsageError(f"config.json: rope_type {kind!r} is not supported for this model type; only 'default' is")
    return float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10000.0)


def transformer_config(hf_config: dict[str, Any], actor: ActorConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's description of the model under this run's layout.

    Raises UsageError for what the family's Megatron form would silently compute differently.
    """
    family, shape = family_of(hf_config), shape_of(hf_config)
    if hf_config.get("hidden_act", "silu") != "silu":
        raise UsageError(f"config.json: hidden_act {hf_config['hidden_act']!r} is not supported; only 'silu' is")
    if hf_config.get("use_sliding_window"):
        raise UsageError("config.json: use_sliding_window is not supported; set it to false")
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=hf_config["hidden_size"],
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=hf_config["intermediate_size"],
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.get("rms_norm_eps", 1e-6),
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=hf_config.get("initializer_range", 0.02),
        tensor_model_parallel_size=actor.tp,
        pipeline_model_parallel_size=actor.pp,
        sequence_parallel=actor.sequence_parallel,
        # Packed micro-batches differ in length, so pipeline stages have to tell each other the shapes.
        variable_seq_lengths=actor.pp > 1,
        # Not used by a dense model, but Megatron checks it against variable_seq_lengths all the same.
        moe_token_dispatcher_type="alltoall",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True,
        # The loss arrives normalised over the global mini-batch: gradients are summed, never averaged.
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        # Fused kernels are CUDA only (or go through torch.compile, which a CPU test must not wait for).
        masked_softmax_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=False,
        persist_layer_norm=on_gpu,
        gradient_accumulation_fusion=False,
        **family.transformer_options,  # type: ignore[arg-type]
    )
