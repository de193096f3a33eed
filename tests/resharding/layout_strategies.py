"""Random models and layouts that fit together, for hypothesis."""

from typing import Any

from hypothesis import strategies as st

from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout
from megatron_riskpo.resharding.pieces import Model
from megatron_riskpo.resharding.schedule import BridgeLayout

ITEM_SIZE = 8  # int64


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    """config.json of a model of any family, small; its layers divide by many pipelines."""
    family = draw(st.sampled_from(["qwen2", "qwen3", "llama", "mistral", "qwen3_moe", "mixtral"]))
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    heads = groups * draw(st.sampled_from([1, 2, 3]))
    config = {
        "model_type": family,
        "num_hidden_layers": draw(st.sampled_from([1, 2, 4, 6, 8])),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([2, 4])),
        "hidden_size": draw(st.integers(3, 7)),
        "intermediate_size": 48,
        "vocab_size": draw(st.integers(5, 200)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    experts = draw(st.sampled_from([2, 4, 6, 8]))
    if family == "qwen3_moe":
        config |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if family == "mixtral":
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    return config


def divisors(*numbers: int, up_to: int) -> list[int]:
    """What divides all of them."""
    return [n for n in range(1, up_to + 1) if all(number % n == 0 for number in numbers)]


@st.composite
def actor_layouts(draw: st.DrawFn, config: dict[str, Any], max_ranks: int = 64) -> ActorLayout:
    """One that Megatron would take for the model."""
    layers, experts = config["num_hidden_layers"], config.get("num_experts") or config.get("num_local_experts") or 0
    tp = draw(st.sampled_from(divisors(config["num_key_value_heads"], config["intermediate_size"], up_to=8)))
    pp = draw(st.sampled_from(divisors(layers, up_to=min(4, max_ranks // tp))))
    vp = draw(st.sampled_from(divisors(layers // pp, up_to=2))) if pp > 1 else 1
    first = last = 0
    if pp == 2 and layers > 2 and vp == 1 and draw(st.booleans()):
        first = draw(st.integers(1, layers - 1))
        last = layers - first
    room = max_ranks // (tp * pp)
    cp = draw(st.sampled_from(divisors(room, up_to=2)))
    dp = draw(st.integers(1, room // cp))
    stage = tp * cp * dp
    ep = draw(st.sampled_from(divisors(experts, stage, up_to=8))) if experts else 1
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    etp = draw(st.sampled_from(divisors(width, stage // ep, up_to=8))) if experts else 1
    return ActorLayout(stage * pp, tp, pp, vp, cp, ep, etp, first, last)


@st.composite
def bridge_layouts(draw: st.DrawFn, max_ranks: int = 64) -> BridgeLayout:
    """A model, an actor, engines of up to 16 ranks each, beside the actor or in its processes."""
    config = draw(hf_configs())
    actor = draw(actor_layouts(config, max_ranks))
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    tps = [n for n in (1, 2, 4, 8, 16) if heads % n == 0 and width % n == 0 and (groups % n == 0 or n % groups == 0)]
    colocated = draw(st.booleans())
    if colocated:
        tps = [n for n in tps if actor.world_size % n == 0]
    tp = draw(st.sampled_from(tps))
    replicas = actor.world_size // tp if colocated else draw(st.integers(1, 5))
    rollout = RolloutLayout(tp, replicas, bool(experts) and draw(st.booleans()), 0 if colocated else actor.world_size)
    return BridgeLayout(
        Model.of(config), actor, rollout, ITEM_SIZE,
        bucket_bytes=draw(st.sampled_from([2**14, 2**15, 2**17, 2**29])), node_size=draw(st.sampled_from([1, 4, 8])),
    )  # fmt: skip
