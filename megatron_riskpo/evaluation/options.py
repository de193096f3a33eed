"""The options of `riskpo evaluate`: those of a training run that have a meaning without training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_riskpo.config import (
    EvaluationConfig,
    ModelConfig,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    ServerConfig,
)
from megatron_riskpo.config_bounds import out_of_bounds
from megatron_riskpo.config_io import RUN_RECORD, config_of_table, load_model_config
from megatron_riskpo.config_layout import engine_experts
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.config_servers import server_urls
from megatron_riskpo.errors import UsageError

IDLE_OPTIONS = (
    *("run.name", "run.dir", "run.stall_limit_s", "rollout.engine", "rollout.group_size", "rollout.temperature"),
    *("rollout.dynamic_sampling", "rollout.max_refills", "rollout.placement", "rollout.servers", "rollout.server_urls"),
    *("rollout.max_staleness", "rollout.sleep"),
    *("rewards.overlong_buffer_tokens", "rewards.overlong_penalty", "rewards.format_bonus"),
    *("evaluation.every", "evaluation.ks", "evaluation.num_samples", "model.path"),
    *("server.start_timeout_s", "server.max_restarts", "server.transfer_dir"),
    "server.transport",
)
"""Options of these sections that mean nothing here, or that a flag of the command sets."""
SERVERS_OWN = (
    *("rollout.tp", "rollout.expert_parallel", "rollout.kv_cache_gib", "rollout.gpu_memory_utilization"),
    "model.dtype",
)
"""Options of the engine in this process; a server has its own."""


@dataclass(frozen=True)
class EvaluateConfig:
    """`riskpo evaluate`; the sections are those of `riskpo train`."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    server: ServerConfig = ServerConfig()
    rewards: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def load_options(
    model: Path, num_samples: int, overrides: Sequence[str], servers: Sequence[str] = ()
) -> EvaluateConfig:
    """The options for a Hugging Face folder (defaults), or for a run folder (the run's own); then `overrides`.
    `servers`: addresses of those that are asked, in place of vLLM in this process.

    The model of a run is its hf/. Raises UsageError: no such model, a model without weights, an option that is wrong or
    means nothing here.
    """
    table = _run_options(model) if (model / RUN_RECORD).is_file() and _is_run(model) else {}
    folder = model / "hf" if table else model
    if table and not folder.is_dir():
        raise UsageError(
            f"{model} has no hf/: its training has not ended; convert a checkpoint with "
            f"riskpo convert megatron-to-hf {model} OUT, and give --model OUT"
        )
    check_model_folder(folder)
    _refuse_idle(overrides, servers)
    if servers:
        # One process suffices to ask; a run's layout is that of its engine.
        table.get("run", {}).pop("ranks", None)
        for name in ("tp", "expert_parallel"):
            table.get("rollout", {}).pop(name, None)
        table.setdefault("rollout", {})["server_urls"] = list(servers)
    table.setdefault("model", {})["path"] = str(folder)
    table.setdefault("evaluation", {})["num_samples"] = num_samples
    config = config_of_table(EvaluateConfig, table, str(model / RUN_RECORD), overrides)
    problem = out_of_bounds(config) or _problem(config)
    if problem:
        raise UsageError(problem)
    return config


def _refuse_idle(overrides: Sequence[str], servers: Sequence[str]) -> None:
    for token in overrides:
        key = token.removeprefix("--").partition("=")[0]
        if not token.startswith("--"):
            continue
        if key in IDLE_OPTIONS:
            raise UsageError(f"--{key} has no effect on an evaluation (riskpo evaluate --help); take it out")
        if servers and key in SERVERS_OWN:
            raise UsageError(f"--{key} has no effect with --server: it is riskpo serve's; take it out")
        if not servers and key.startswith("server."):
            raise UsageError(f"--{key} has no effect without --server; take it out, or name servers")


def check_model_folder(folder: Path) -> None:
    """Raise UsageError unless there are a config.json and weights."""
    load_model_config(folder, "--model")
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"--model {folder} has a config.json, but no *.safetensors: a model folder without weights")


def _is_run(folder: Path) -> bool:
    """A run's config.json has the run's options; a model's has none."""
    return isinstance(_record(folder).get("config"), dict)


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / RUN_RECORD} is not readable as JSON ({error}); restore the file") from error
    return record if isinstance(record, dict) else {}


def _run_options(folder: Path) -> dict[str, Any]:
    """Of the run's options those that say how it asks and grades; the engine is always vLLM."""
    config = _record(folder)["config"]
    taken = {
        name: dict(config.get(name, {}))
        for name in ("run", "model", "data", "rollout", "server", "rewards", "evaluation")
    }
    for name in taken["rollout"].keys() & {"engine", "placement", "servers", "server_urls", "max_staleness", "sleep"}:
        del taken["rollout"][name]
    return taken


def _problem(config: EvaluateConfig) -> str | None:
    num, ranks, tp = config.evaluation.num_samples, config.run.ranks, config.rollout.tp
    if config.evaluation.temperature == 0 and num > 1:
        return f"evaluation.temperature = 0 gives {num} times the same answer; use --num-samples 1"
    if ranks and ranks % tp:
        return f"rollout.tp = {tp} does not divide run.ranks = {ranks}; change one of them"
    setup = Setup(config, ranks, load_model_config(config.model.path, "--model"))
    return server_urls(setup) or engine_experts(setup)
