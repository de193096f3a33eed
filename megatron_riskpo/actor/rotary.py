"""Rotary frequencies as config.json asks for them: plain, or scaled for longer contexts as Llama 3 does."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.errors import UsageError

DEFAULT_BASE = 10000.0


def _rope(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes everything into rope_parameters, earlier ones rope_theta beside rope_scaling."""
    return hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}


def rope_base(hf_config: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies."""
    rope = _rope(hf_config)
    given = [options for options in (rope, hf_config) if options.get("rope_theta")]
    return _number(given[0], "rope_theta") if given else DEFAULT_BASE


def rotary_frequencies(hf_config: Mapping[str, Any], head_dim: int) -> Tensor:
    """float32 [head_dim / 2], in radians a position.

    Raises UsageError for a rope_type other than default, linear and llama3, an option of it that is missing or no
    number, and a partial rotation.
    """
    rope = _rope(hf_config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UsageError("config.json: partial_rotary_factor other than 1 is not supported")
    base = rope_base(hf_config)
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match kind:
        case "default":
            return frequencies
        case "linear":
            return frequencies / _number(rope, "factor")
        case "llama3":
            return _llama3(frequencies, rope)
    raise UsageError(f"config.json: rope_type {kind!r} is not supported; known: default, linear, llama3")


def _number(options: Mapping[str, Any], key: str) -> float:
    value = options.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UsageError(f"config.json: the rotary option {key} is {value!r}; it must be a number above 0")
    return float(value)


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's scaling (arXiv 2407.21783; parameters as in config.json): waves longer than the original context are
    slowed by `factor`, short ones stay, those between are interpolated."""
    names = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    original, low, high, factor = (_number(rope, name) for name in names)
    wavelengths = 2 * math.pi / frequencies
    kept = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies
