"""Random tiny Qwen2 checkpoints in Hugging Face form, and their log-probs by transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 96


def make_tiny_qwen2(
    folder: Path,
    *,
    tied: bool,
    seed: int,
    num_layers: int = 2,
    hidden_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int = VOCAB_SIZE,
) -> Path:
    """Write config.json and model.safetensors (float32) of a random model whose next-token distributions are
    far from flat; returns the folder. Head dimension 32 is the smallest that vLLM's CPU attention has."""
    config = Qwen2Config(
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
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        for parameter in model.parameters():
            # Norm weights and biases too: a mix-up of two equal tensors would not show.
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    model.save_pretrained(folder)
    return folder


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
