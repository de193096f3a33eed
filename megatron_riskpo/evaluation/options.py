"""The options of `riskpo evaluate`: those of a training run that have a meaning without training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_riskpo.config import EvaluationConfig, ModelConfig, PromptConfig, RewardConfig, RolloutConfig, RunConfig
from megatron_riskpo.config_bounds import out_of_bounds
from megatron_riskpo.config_io import RUN_RECORD, config_of_table, load_model_config
from megatron_riskpo.errors import UsageError

IDLE_OPTIONS = (
    *("run.name", "run.dir", "rollout.engine", "rollout.group_size", "rollout.temperature"),
    *("rollout.dynamic_sampling", "rollout.max_refills", "rollout.placement", "rollout.servers", "rollout.server_urls"),
    *("rollout.max_staleness", "rollout.sleep"),
    *("rewards.overlong_buffer_tokens", "rewards.overlong_penalty", "rewards.format_bonus"),
    *("evaluation.every", "evaluation.ks", "evaluation.num_samples", "model.path"),
)
"""Options of these sections that mean nothing here, or that a flag of the command sets."""


@dataclass(frozen=True)
class EvaluateConfig:
    """`riskpo evaluate`; the sections are those of `riskpo train`."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def load_options(model: Path, num_samples: int, overrides: Sequence[str]) -> EvaluateConfig:
    """The options for a Hugging Face folder (defaults), or for a run folder (the run's own); then `overrides`.

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
    for token in overrides:
        key = token.removeprefix("--").partition("=")[0]
        if token.startswith("--") and key in IDLE_OPTIONS:
            raise UsageError(f"--{key} has no effect on an evaluation (riskpo evaluate --help); take it out")
    table.setdefault("model", {})["path"] = str(folder)
    table.setdefault("evaluation", {})["num_samples"] = num_samples
    config = config_of_table(EvaluateConfig, table, str(model / RUN_RECORD), overrides)
    problem = out_of_bounds(config) or _problem(config)
    if problem:
        raise UsageError(problem)
    return config


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
    taken = {name: dict(config.get(name, {})) for name in ("run", "model", "data", "rollout", "rewards", "evaluation")}
    for name in taken["rollout"].keys() & {"engine", "placement", "servers", "server_urls", "max_staleness", "sleep"}:
        del taken["rollout"][name]
    return taken


def _problem(config: EvaluateConfig) -> str | None:
    num, ranks, tp = config.evaluation.num_samples, config.run.ranks, config.rollout.tp
    if config.evaluation.temperature == 0 and num > 1:
        return f"evaluation.temperature = 0 gives {num} times the same answer; use --num-samples 1"
    if ranks and ranks % tp:
        return f"rollout.tp = {tp} does not divide run.ranks = {ranks}; change one of them"
    return None
