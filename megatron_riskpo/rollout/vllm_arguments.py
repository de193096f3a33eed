"""How every vLLM of this project is set up, in the training processes and as a server: sampling is the same."""

from typing import Any

import numpy as np
import torch

from megatron_riskpo.config import RolloutConfig

# Tokens in one forward pass on the CPU, unless a single sequence has more.
_BATCHED_TOKENS = 8192


def engine_arguments(
    config: RolloutConfig, dtype: str, max_model_len: int, seed: int, load_checkpoint: bool
) -> dict[str, Any]:
    """vLLM's engine arguments, all but how its workers are started."""
    return {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tp,
        "enable_expert_parallel": config.expert_parallel,
        "load_format": "auto" if load_checkpoint else "dummy",
        "logprobs_mode": "processed_logprobs",  # temperature applied
        "generation_config": "vllm",  # the checkpoint's generation_config.json must not change the sampling
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": seed,
        **_platform_arguments(config, max_model_len),
    }


def _platform_arguments(config: RolloutConfig, max_model_len: int) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": config.gpu_memory_utilization}
    return {
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "enforce_eager": True,
        # After a part of a prompt vLLM rewinds the request's generator, which a CPU generator cannot do ("CPU
        # Generator does not use offset"); so a prompt is taken whole, and the budget has to hold the longest.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_BATCHED_TOKENS, max_model_len),
    }


def request_seeds(seed: int, group_size: int) -> list[int]:
    """One seed (0 <= seed < 2**63) a response. vLLM's own n > 1 takes seed, seed + 1, ...: prompts with neighbouring
    seeds would share random numbers."""
    return (np.random.SeedSequence(seed).generate_state(group_size, np.uint64) >> np.uint64(1)).tolist()
