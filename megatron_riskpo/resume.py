"""Whether a run may go on from its checkpoints under the present configuration: runs/NAME/config.json holds the one
that they were made with."""

import json
from pathlib import Path
from typing import Any

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_io import RUN_RECORD, resolved
from megatron_riskpo.errors import UsageError

# What may change within a run: where it lives, how long it is, what it writes down, what ends it, and how the work is
# laid out, which changes its speed but not what is computed.
FREE_SECTIONS = ("bridge", "server", "evaluation", "checkpoint", "logging")
FREE_OPTIONS = (
    *("run.name", "run.dir", "run.steps", "run.resume", "run.ranks", "run.timeout_s"),
    *("actor.tp", "actor.pp", "actor.vp", "actor.cp", "actor.ep", "actor.sequence_parallel"),
    *("actor.first_stage_layers", "actor.last_stage_layers", "actor.micro_batch_tokens"),
    *("actor.recompute", "actor.offload_optimizer", "actor.offload_gradients"),
    *("rollout.placement", "rollout.servers", "rollout.server_urls"),
    *("rollout.tp", "rollout.max_num_seqs", "rollout.kv_cache_gib", "rollout.gpu_memory_utilization"),
    "rollout.sleep",
    *("rewards.workers", "rewards.timeout_s"),
    *("mismatch.abort_above", "optimizer.max_skipped_steps"),
)
_ABSENT = object()


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options, as "section.key old -> new", in which two resolved configurations differ and a run may not.

    An option that only one of them has counts as changed.
    """
    before, after = _leaves(old), _leaves(new)
    return [
        f"{key} {_shown(before.get(key, _ABSENT))} -> {_shown(after.get(key, _ABSENT))}"
        for key in before | after
        if not _may_change(key) and before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def check_resume(config: TrainConfig, run_dir: Path) -> None:
    """Raise UsageError unless the run in `run_dir`, which has a checkpoint, may go on with `config`."""
    record = run_dir / RUN_RECORD
    try:
        old = json.loads(record.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{record} does not say under which configuration the checkpoints beside it were made "
            f"({type(error).__name__}); restore the file, or choose another run.name"
        ) from error
    changed = changed_options(old, resolved(config))
    if changed:
        raise UsageError(
            f"{run_dir} has checkpoints made with other options: {', '.join(changed)}; "
            "restore them, or choose another run.name"
        )


def _may_change(key: str) -> bool:
    return key in FREE_OPTIONS or key.partition(".")[0] in FREE_SECTIONS


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in table.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _shown(value: Any) -> str:
    return "(not set)" if value is _ABSENT else json.dumps(value)
