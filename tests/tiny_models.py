"""Random tiny checkpoints of every model family in Hugging Face form, and their log-probs by transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 96

_LLAMA3_ROPE = {
    # Short contexts, so that of 16 frequencies some stay, some are slowed and some lie between.
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama": (LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": (MistralConfig, {"head_dim": 64, "sliding_window": None}),
}
"""By model_type: transformers' configuration, and what the family has of its own."""


def make_tiny(
    folder: Path,
    family: str,
    *,
    tied: bool,
    seed: int,
    num_layers: int = 2,
    hidden_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int = VOCAB_SIZE,
    std: float = 0.1,
    **options: Any,
) -> Path:
    """Write config.json and safetensors (float32) of a random model; returns the folder.

    With weights of the default standard deviation its next-token distributions are far from flat. `options` go to
    transformers' configuration."""
    config_class, own = FAMILIES[family]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
        **{**own, **options},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # Norm weights and biases too: a mix-up of two equal tensors would not show.
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=std)
    model.save_pretrained(folder)
    return folder


def make_tiny_qwen2(folder: Path, *, tied: bool, seed: int, **sizes: int) -> Path:
    """`make_tiny` of the family that most tests take. Head dimension 32 is the smallest that vLLM's CPU attention
    has."""
    return make_tiny(folder, "qwen2", tied=tied, seed=seed, **sizes)


def load_hf(folder: Path) -> torch.nn.Module:
    """The checkpoint as a transformers model, float32, eager attention, eval mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def hf_token_logprobs(model: torch.nn.Module, sequence: Sequence[int], temperature: float = 1.0) -> Tensor:
    """float32 [len(sequence) - 1]: log-prob of each token after the first, given the ones before it."""
    tokens = torch.as_tensor(sequence)
    logits = model(tokens[None]).logits[0, :-1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
