"""The range of every option that has one of its own; rules that join several options are in config_checks.py."""

import operator
from typing import Any

_OPERATORS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}

# (option, comparison, bound); options that the command does not have are skipped.
BOUNDS: tuple[tuple[str, str, float], ...] = (
    ("run.steps", ">=", 1),
    ("run.seed", ">=", 0),
    ("run.ranks", ">=", 0),
    ("run.timeout_s", ">", 0),
    ("run.stall_limit_s", ">=", 0),
    ("data.train_size", ">=", 1),
    ("data.evaluation_size", ">=", 1),
    ("data.prompts_per_step", ">=", 1),
    ("data.max_prompt_tokens", ">=", 1),
    ("rollout.group_size", ">=", 1),
    ("rollout.max_response_tokens", ">=", 1),
    ("rollout.temperature", ">", 0),
    ("rollout.max_refills", ">=", 0),
    ("rollout.tp", ">=", 1),
    ("rollout.max_num_seqs", ">=", 1),
    ("rollout.kv_cache_gib", ">", 0),
    ("rollout.gpu_memory_utilization", ">", 0),
    ("rollout.gpu_memory_utilization", "<=", 1),
    ("rollout.servers", ">=", 1),
    ("rollout.max_staleness", ">=", 0),
    ("server.max_concurrent", ">=", 1),
    ("server.health_timeout_s", ">", 0),
    ("server.request_timeout_s", ">", 0),
    ("server.push_timeout_s", ">", 0),
    ("server.start_timeout_s", ">", 0),
    ("server.max_retries", ">=", 0),
    ("server.max_restarts", ">=", 0),
    ("actor.tp", ">=", 1),
    ("actor.pp", ">=", 1),
    ("actor.vp", ">=", 1),
    ("actor.cp", ">=", 1),
    ("actor.ep", ">=", 1),
    ("actor.etp", ">=", 1),
    ("actor.first_stage_layers", ">=", 0),
    ("actor.last_stage_layers", ">=", 0),
    ("actor.mini_batches", ">=", 1),
    ("actor.micro_batch_tokens", ">=", 1),
    ("optimizer.lr", ">=", 0),
    ("optimizer.warmup_steps", ">=", 0),
    ("optimizer.weight_decay", ">=", 0),
    ("optimizer.beta1", ">=", 0),
    ("optimizer.beta1", "<", 1),
    ("optimizer.beta2", ">=", 0),
    ("optimizer.beta2", "<", 1),
    ("optimizer.eps", ">", 0),
    ("optimizer.clip_grad", ">=", 0),
    ("optimizer.max_skipped_steps", ">=", 0),
    ("bridge.bucket_mib", ">", 0),
    ("bridge.timeout_s", ">", 0),
    ("bridge.tolerance", ">", 0),
    ("rewards.overlong_buffer_tokens", ">=", 0),
    ("rewards.overlong_penalty", ">=", 0),
    ("rewards.timeout_s", ">", 0),
    ("rewards.cpu_s", ">", 0),
    ("rewards.memory_gib", ">", 0),
    ("rewards.tolerance", ">=", 0),
    ("rewards.test_cpu_s", ">", 0),
    ("rewards.test_memory_mib", ">=", 64),
    ("rewards.program_timeout_s", ">", 0),
    ("rewards.max_error_share", ">=", 0),
    ("rewards.max_error_share", "<=", 1),
    ("rewards.gold_checks", ">=", 0),
    ("rewards.workers", ">=", 1),
    ("evaluation.every", ">=", 0),
    ("evaluation.num_samples", ">=", 1),
    ("evaluation.temperature", ">=", 0),
    ("checkpoint.every", ">=", 1),
    ("checkpoint.keep", ">=", 1),
    ("checkpoint.keep_every", ">=", 0),
    ("logging.samples", ">=", 0),
    ("logging.samples_every", ">=", 0),
    ("sft.steps", ">=", 1),
    ("sft.batch_size", ">=", 1),
    ("shape.num_layers", ">=", 1),
    ("shape.hidden_size", ">=", 1),
    ("shape.num_attention_heads", ">=", 1),
    ("shape.num_key_value_heads", ">=", 1),
    ("shape.intermediate_size", ">=", 1),
    ("shape.max_position_embeddings", ">=", 2),
    ("shape.initializer_range", ">", 0),
)


def out_of_bounds(config: Any) -> str | None:
    """What to say of the first option of a TrainConfig or SftConfig that is out of range."""
    for key, sign, bound in BOUNDS:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section, None), name, None)
        if value is not None and not _OPERATORS[sign](value, bound):
            return f"{key} = {value} is out of range; it must be {sign} {bound}"
    return None
