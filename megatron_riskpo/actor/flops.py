"""FLOPs that a model has to do for given sequences: what it must compute, not what a kernel may do besides.

Counted are the matrix products, a multiply-add as two: the linear layers, causal attention within each sequence, and
the output layer for the tokens that go through it. Not counted: norms, activations, rotary positions, softmax, the
embedding look-up, padding, and what is computed again in the backward pass.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BACKWARD = 2
"""FLOPs of a backward pass over those of its forward pass: gradients of the weights, and of the inputs."""


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of a whole model."""

    per_token: float
    """Of the linear layers."""
    per_squared_length: float
    """Of attention in a sequence of s tokens, over s^2. Query i sees i of the s keys: half of all pairs."""
    per_target: float
    """Of the output layer for one token."""

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelFlops":
        """Of a Hugging Face config.json of type qwen2, qwen3, qwen3_moe, llama, mistral, or one with their layers.

        Every layer is taken to attend to its whole sequence: a sliding window is not looked at.
        """
        hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // num_heads
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        query, key = num_heads * head_dim, num_kv_heads * head_dim
        num_layers = config["num_hidden_layers"]
        projections = hidden * (query + 2 * key) + query * hidden
        mlp_weights = sum(_active_mlp_weights(config, layer) for layer in range(num_layers))
        return cls(
            per_token=2.0 * (num_layers * projections + mlp_weights),
            # Two products, of queries with keys and of weights with values.
            per_squared_length=num_layers * 2 * 2.0 * query / 2,
            per_target=2.0 * hidden * config["vocab_size"],
        )

    def forward(self, lengths: Iterable[int], num_targets: int) -> float:
        """Of packed sequences of the given lengths, num_targets tokens of which go through the output layer."""
        tokens = squares = 0
        for length in lengths:
            tokens += length
            squares += length * length
        return self.per_token * tokens + self.per_squared_length * squares + self.per_target * num_targets

    def forward_backward(self, lengths: Iterable[int], num_targets: int) -> float:
        """Of `forward` with its backward pass."""
        return (1 + BACKWARD) * self.forward(lengths, num_targets)


def num_experts(config: Mapping[str, Any]) -> int:
    """Experts of a mixture-of-experts layer, 0 in a dense model."""
    # transformers 5 writes num_local_experts, earlier ones num_experts.
    return config.get("num_local_experts") or config.get("num_experts") or 0


def expert_width(config: Mapping[str, Any]) -> int:
    """Columns of an expert; models in which every layer has experts may write it as any MLP's."""
    return config.get("moe_intermediate_size") or config["intermediate_size"]


def _active_mlp_weights(config: Mapping[str, Any], layer: int) -> int:
    """Weights of a gated MLP that a token meets: of the router and the experts it goes to, in a layer that has them."""
    hidden, experts = config["hidden_size"], num_experts(config)
    every = config.get("decoder_sparse_step") or 1
    if not experts or layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % every:
        return 3 * hidden * config["intermediate_size"]
    return hidden * experts + config["num_experts_per_tok"] * 3 * hidden * expert_width(config)
