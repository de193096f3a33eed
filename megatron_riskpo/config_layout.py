"""Rules on the model and on its layout over the ranks: the same for training and warm start."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_riskpo.actor.flops import expert_width, num_experts
from megatron_riskpo.config_rules import Rule, Setup, common_divisors, multiples, nearest, no_divisor, undivided
from megatron_riskpo.errors import UsageError


def mlp_columns(model: Mapping[str, Any]) -> dict[str, int]:
    """The width that splitting an MLP divides, by its name."""
    if num_experts(model):
        return {"columns of an expert": expert_width(model)}
    return {"MLP columns (intermediate_size)": model["intermediate_size"]}


def model_sizes(setup: Setup) -> str | None:
    sizes = ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings"]
    optional = ("num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "moe_intermediate_size")
    sizes += [key for key in optional if setup.model.get(key)]
    if num_experts(setup.model):
        sizes.append("num_experts_per_tok")
    if setup.config.model.path:
        sizes.append("vocab_size")  # of a model that is made from nothing the tokenizer says it
    for key in sizes:
        value = setup.model.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return (
                f"the model's config.json has {key} = {value!r}; a decoder-only language model with that size is needed"
            )
    return None


def model_heads(setup: Setup) -> str | None:
    heads = setup.model["num_attention_heads"]
    groups = setup.model.get("num_key_value_heads") or heads
    if heads % groups:
        return f"the model's config.json has {heads} attention heads, which its {groups} key-value heads do not divide"
    head_dim = setup.model.get("head_dim") or setup.model["hidden_size"] // heads
    if head_dim % 2:
        return f"the model's config.json gives a head dimension of {head_dim}; rotary embeddings need an even one"
    experts, chosen = num_experts(setup.model), setup.model.get("num_experts_per_tok")
    if experts and chosen > experts:
        return f"the model's config.json has num_experts_per_tok = {chosen} of {experts} experts"
    return None


def model_type(setup: Setup) -> str | None:
    # Imported here: it brings in torch.
    from megatron_riskpo.checkpoint.weight_map import family_of

    return _refusal(family_of, setup.model)


def _refusal(check: Callable[[Mapping[str, Any]], object], model: Mapping[str, Any]) -> str | None:
    try:
        check(model)
    except UsageError as error:
        return f"{error}; choose another model.path"
    return None


def architecture(setup: Setup) -> str | None:
    from megatron_riskpo.actor.architecture import check_architecture

    return _refusal(check_architecture, setup.model)


def tensor_parallel(setup: Setup) -> str | None:
    """Megatron gives each rank whole query heads, whole key-value heads and equal MLP columns (experts: actor.etp)."""
    heads = setup.model["num_attention_heads"]
    sizes = {
        "attention heads": heads,
        "key-value heads": setup.model.get("num_key_value_heads") or heads,
        **({} if num_experts(setup.model) else mlp_columns(setup.model)),
    }
    return undivided("actor.tp", setup.config.actor.tp, sizes)


def pipeline_parallel(setup: Setup) -> str | None:
    """Even stages; or the first and the last as the user says, and even ones between."""
    actor, layers = setup.config.actor, setup.model["num_hidden_layers"]
    given = [n for n in (actor.first_stage_layers, actor.last_stage_layers) if n]
    if not given:
        return no_divisor("actor.pp", actor.pp, layers, "layers of the model") if layers % actor.pp else None
    said = (
        f"actor.first_stage_layers = {actor.first_stage_layers} and actor.last_stage_layers = {actor.last_stage_layers}"
    )
    if actor.pp == 1:
        return f"{said} need actor.pp > 1, got actor.pp = 1; set them to 0"
    left, stages = layers - sum(given), actor.pp - len(given)
    if stages and (left < stages or left % stages):
        fitting = multiples(stages, left) if left > stages else str(stages)
        return (
            f"{said} leave {left} of {layers} layers to {stages} other stages, which cannot have equally many; leave "
            f"{fitting}"
        )
    if not stages and left:
        return f"{said} are {sum(given)} layers on the 2 stages, the model has {layers}; set one of them to 0"
    return None


def virtual_pipeline(setup: Setup) -> str | None:
    actor, layers = setup.config.actor, setup.model["num_hidden_layers"]
    if actor.vp == 1:
        return None
    if actor.pp == 1:
        return f"actor.vp = {actor.vp} needs actor.pp > 1, got actor.pp = 1; set it to 1"
    if actor.first_stage_layers or actor.last_stage_layers:
        return f"actor.vp = {actor.vp} needs even stages; set actor.first_stage_layers and last_stage_layers to 0"
    if layers // actor.pp % actor.vp:
        return no_divisor("actor.vp", actor.vp, layers // actor.pp, "layers of a pipeline stage")
    return None


def expert_parallel(setup: Setup) -> str | None:
    actor, experts = setup.config.actor, num_experts(setup.model)
    for option, size in {"actor.ep": actor.ep, "actor.etp": actor.etp}.items():
        if size > 1 and not experts:
            return f"{option} = {size}, but the model has no experts; set it to 1"
    if experts and actor.tp > 1 and not actor.sequence_parallel:
        return f"actor.tp = {actor.tp} with experts needs actor.sequence_parallel = true"
    return None


def expert_ranks(setup: Setup) -> str | None:
    ep, experts = setup.config.actor.ep, num_experts(setup.model)
    of_a_stage = setup.world_size // setup.config.actor.pp
    if experts % ep or of_a_stage % ep:
        valid = common_divisors(experts, of_a_stage)
        return (
            f"actor.ep = {ep} does not divide both the {experts} experts of a layer and the {of_a_stage} ranks of a "
            f"pipeline stage; use {nearest(valid, ep)}"
        )
    return None


def engine_experts(setup: Setup) -> str | None:
    """vLLM deals experts out in turn: where tp does not divide them, the first ranks have one more."""
    rollout, experts = setup.config.rollout, num_experts(setup.model)
    if not rollout.expert_parallel:
        return None
    if rollout.engine != "vllm":
        return (
            f'rollout.expert_parallel is for vLLM; with rollout.engine = "{rollout.engine}" experts lie as actor.ep '
            "says: set it to false"
        )
    if not experts:
        return "rollout.expert_parallel = true, but the model has no experts; set it to false"
    if rollout.tp == 1:
        return (
            "rollout.expert_parallel = true needs rollout.tp > 1, over whose ranks experts are dealt out; set it to "
            "false, or raise rollout.tp"
        )
    if rollout.tp > experts:
        return (
            f"rollout.expert_parallel = true with rollout.tp = {rollout.tp} leaves ranks without any of the {experts} "
            f"experts of a layer; use rollout.tp {experts} or less"
        )
    return None


def expert_split(setup: Setup) -> str | None:
    actor = setup.config.actor
    if actor.etp == 1:
        return None
    width, left = expert_width(setup.model), setup.world_size // actor.pp // actor.ep
    if width % actor.etp or left % actor.etp:
        valid = common_divisors(width, left)
        return (
            f"actor.etp = {actor.etp} does not divide both the {width} columns of an expert and the {left} ranks of a "
            f"pipeline stage that hold the same experts (actor.ep = {actor.ep}); use {nearest(valid, actor.etp)}"
        )
    return None


def world_split(setup: Setup) -> str | None:
    actor = setup.config.actor
    size = actor.tp * actor.cp * actor.pp
    if setup.world_size % size:
        return (
            f"{setup.world_size} ranks cannot be split into groups of actor.tp * actor.cp * actor.pp = {actor.tp} * "
            f"{actor.cp} * {actor.pp} = {size}; use {multiples(size, setup.world_size)} ranks"
        )
    return None


def sequence_parallel(setup: Setup) -> str | None:
    actor = setup.config.actor
    if actor.sequence_parallel and actor.tp == 1:
        return "actor.sequence_parallel = true needs actor.tp > 1, got actor.tp = 1; set it to false"
    return None


def layout_words(actor: Mapping[str, Any], world_size: int) -> str:
    """tp 8 pp 4 dp 2 ..., sizes of 1 left out. `actor`: ActorConfig as a dict, such as a run's record has."""
    sizes = {name: actor[name] for name in ("tp", "pp", "vp", "cp", "ep", "etp")}
    sizes["dp"] = world_size // (actor["tp"] * actor["cp"] * actor["pp"])
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    words += [f"recompute {actor['recompute']}"] * (actor["recompute"] != "none")
    return " ".join(words + ["offload"] * actor["offload_optimizer"]) or "one rank"


LAYOUT_RULES: tuple[Rule, ...] = (
    model_type,
    model_sizes,
    model_heads,
    architecture,
    tensor_parallel,
    pipeline_parallel,
    virtual_pipeline,
    expert_parallel,
    world_split,
    expert_ranks,
    expert_split,
    sequence_parallel,
)
