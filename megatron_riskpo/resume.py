"""Whether a run may go on from a checkpoint under the present configuration, which may differ from the one that the
checkpoint was made under."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_io import config_hash, resolved
from megatron_riskpo.errors import UsageError

# What may change within a run: where it lives, how long it is, what it writes down, what ends it, and how the work is
# laid out, which changes its speed but not what is computed.
FREE_SECTIONS = ("bridge", "server", "evaluation", "checkpoint", "logging")
FREE_OPTIONS = (
    *("run.name", "run.dir", "run.steps", "run.resume", "run.ranks", "run.timeout_s", "run.stall_limit_s"),
    "run.accept_changes",
    *("actor.tp", "actor.pp", "actor.vp", "actor.cp", "actor.ep", "actor.etp", "actor.sequence_parallel"),
    *("actor.first_stage_layers", "actor.last_stage_layers", "actor.micro_batch_tokens"),
    *("actor.recompute", "actor.offload_optimizer", "actor.offload_gradients"),
    *("rollout.placement", "rollout.servers", "rollout.server_urls"),
    *("rollout.tp", "rollout.max_num_seqs", "rollout.kv_cache_gib", "rollout.gpu_memory_utilization"),
    *("rollout.sleep", "rollout.expert_parallel"),
    *("rewards.workers", "rewards.timeout_s", "rewards.cpu_s", "rewards.memory_gib", "rewards.sandbox_url"),
    *("rewards.max_error_share", "rewards.gold_checks"),
    *("mismatch.abort_above", "optimizer.max_skipped_steps"),
)
ALL = "all"
_ABSENT = object()


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """The options in which two resolved configurations differ and a run may not, each with "old -> new".

    An option that only one of them has counts as changed.
    """
    before, after = _leaves(old), _leaves(new)
    return {
        key: f"{_shown(before.get(key, _ABSENT))} -> {_shown(after.get(key, _ABSENT))}"
        for key in before | after
        if not _may_change(key) and before.get(key, _ABSENT) != after.get(key, _ABSENT)
    }


def check_resume(config: TrainConfig, checkpoint: Path, saved: dict[str, Any] | None) -> dict[str, str]:
    """Of `changed_options` those that run.accept_changes lets through; raises UsageError if there are others.

    saved: the resolved configuration that the checkpoint was made under, None if it has none.
    """
    accepted = config.run.accept_changes
    if saved is None:
        if ALL in accepted:
            return {}
        raise UsageError(
            f"{checkpoint} does not say under which options it was made (an earlier version wrote it); "
            f"choose another run.name, or go on all the same with --run.accept_changes {ALL}"
        )
    if config_hash(saved) == config_hash(resolved(config)):
        return {}
    changed = changed_options(saved, resolved(config))
    refused = [key for key in changed if key not in accepted and ALL not in accepted]
    if refused:
        raise UsageError(
            f"{checkpoint} was made with other options: {', '.join(f'{key} {changed[key]}' for key in refused)}; "
            f"restore them, choose another run.name, or go on with --run.accept_changes {' '.join(refused)}"
        )
    return changed


def without_outdated(state: dict[str, Any], changed: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The trainer's saved state without what does not outlast the changes of these options, and what that is.

    Other questions, another order or other prompts: the data position and the pass rates are of no question there is
    now. Another objective: the tracked quantiles may be of other levels, and of scores of another range.
    """
    objective, anew = dict(state["objective"]), []
    stream = state["stream"]
    if any(_decides_questions(key) for key in changed):
        stream, objective["pass_rates"] = None, None
        anew += ["data position", "pass rates"]
    elif "data.prompts_per_step" in changed and stream.get("ahead"):
        stream = stream | {"ahead": {}}
        anew += ["steps sampled ahead, whose questions are passed over"]
    if any(key.startswith("algorithm.") for key in changed):
        objective |= {"tracker": None, "quantiles": None}
        anew += ["quantile tracker"]
    return state | {"stream": stream, "objective": objective}, anew


def _decides_questions(key: str) -> bool:
    is_data = key.startswith("data.") and key != "data.prompts_per_step"
    return is_data or key in ("run.seed", "model.path")


def _may_change(key: str) -> bool:
    return key in FREE_OPTIONS or key.partition(".")[0] in FREE_SECTIONS


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in table.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _shown(value: Any) -> str:
    return "(not set)" if value is _ABSENT else json.dumps(value)
