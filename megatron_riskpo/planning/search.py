"""The layouts of a configuration that fit on so many GPUs, fastest first."""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from megatron_riskpo.actor.flops import expert_width, num_experts
from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_checks import PLAN_RULES, problems
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.planning.activations import ActivationBytes, PassBytes
from megatron_riskpo.planning.gpus import GPUS_A_NODE, Gpu
from megatron_riskpo.planning.memory import RankMemory, engine_bytes, phases
from megatron_riskpo.planning.model_size import BYTES, layer_parameters, outer_parameters
from megatron_riskpo.planning.pipeline import layers_of_chunk, most_in_flight
from megatron_riskpo.planning.plan import Plan, make_plan
from megatron_riskpo.planning.state_bytes import StateBytes, stage_ranks
from megatron_riskpo.planning.step_time import plan_time
from megatron_riskpo.planning.workload import Workload, workload

LAYOUT_OPTIONS = (
    *("tp", "pp", "vp", "cp", "ep", "etp", "sequence_parallel", "recompute", "offload_optimizer"),
    *("first_stage_layers", "last_stage_layers"),
)
"""Options of [actor] that the search sets."""
MAX_TRIED = 16
"""Layouts that are planned in full, beyond the rough estimate."""


def search(
    config: TrainConfig, hf_config: dict[str, Any], world_size: int, gpu: Gpu, mean_response: float | None = None,
    top: int = 5,
) -> list[Plan]:  # fmt: skip
    """At most `top` plans that break no rule and fit, by predicted time of a step.

    Every layout is estimated by formulas first; then the fastest that seem to fit are planned in full, until enough of
    them do. Several layouts that differ only in how much they recompute or offload count as one: the fastest.
    """
    estimated = sorted(
        (
            (seconds, number, candidate)
            for number, candidate in enumerate(candidates(config, hf_config, world_size))
            for seconds, peak in [_estimate(candidate, hf_config, world_size, gpu, mean_response)]
            if peak <= 1.1 * gpu.memory
        ),
    )
    found: dict[tuple, Plan] = {}
    for _, _, candidate in estimated[:MAX_TRIED]:
        key = _split(candidate)
        if key in found or len(found) == top:
            continue
        # The first stage has most in flight, the last the output layer; none between needs more.
        ranks = stage_ranks(candidate.actor, world_size)
        plan = make_plan(candidate, hf_config, world_size, gpu, mean_response, sorted({ranks[0], ranks[-1]}))
        if not plan.complaints:
            found[key] = plan
    return sorted(found.values(), key=lambda plan: plan.time.seconds)


def candidates(config: TrainConfig, hf_config: Mapping[str, Any], world_size: int) -> Iterator[TrainConfig]:
    """Every layout of whole experts that breaks no rule. What is no layout stays as it is; so does `rollout.tp`, but
    where it breaks a rule or is the same as before, which the search cannot tell from the actor's."""
    layers, experts = hf_config["num_hidden_layers"], num_experts(hf_config)
    expert_sizes = [n for n in _powers(min(64, world_size)) if experts and experts % n == 0] or [1]
    for tp, pp, cp, ep in product(_powers(GPUS_A_NODE), _powers(min(32, layers)), _powers(8), expert_sizes):
        if tp * pp * cp > world_size:
            continue
        vps = (1, 2) if pp > 1 else (1,)
        for vp, recompute, offload in product(vps, ("none", "full"), (False, True)):
            actor = dataclasses.replace(
                config.actor, tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, etp=1, sequence_parallel=tp > 1,
                recompute=recompute, offload_optimizer=offload, first_stage_layers=0, last_stage_layers=0,
            )  # fmt: skip
            candidate = dataclasses.replace(config, actor=actor)
            if next(problems(PLAN_RULES, Setup(candidate, world_size, hf_config)), None) is None:
                yield candidate


def _powers(largest: int) -> list[int]:
    return [2**n for n in range(largest.bit_length()) if 2**n <= largest]


def _split(config: TrainConfig) -> tuple:
    actor = config.actor
    return actor.tp, actor.pp, actor.vp, actor.cp, actor.ep


def _estimate(
    config: TrainConfig, hf_config: Mapping[str, Any], world_size: int, gpu: Gpu, mean_response: float | None
) -> tuple[float, float]:
    """Seconds of a step and bytes of the first stage's rank, by formulas alone."""
    work = workload(config, Setup(config, world_size, hf_config).data_parallel, mean_response)
    state = _estimated_state(config, hf_config, world_size)
    activations = _estimated_activations(config, hf_config, work)
    engine = engine_bytes(config, hf_config, gpu)
    marks = phases(config, hf_config, state, activations, engine)
    memory = RankMemory(0, 0, state, activations, engine, marks, host=0)
    return plan_time(config, hf_config, world_size, gpu, work, memory).seconds, memory.peak


def _estimated_state(config: TrainConfig, hf_config: Mapping[str, Any], world_size: int) -> StateBytes:
    actor, size = config.actor, BYTES[config.model.dtype]
    layers = hf_config["num_hidden_layers"] / actor.pp
    shared, of_experts = layer_parameters(hf_config)
    dense = shared * layers / actor.tp + outer_parameters(hf_config) / actor.tp / min(actor.pp, 2)
    experts = of_experts * layers / actor.ep
    of_a_stage = world_size // actor.pp
    sharded = actor.distributed_optimizer
    owned = dense / (of_a_stage / actor.tp) + experts / (of_a_stage / actor.ep) if sharded else dense + experts
    number = dense + experts
    main = 4 * owned if size < 4 else 0
    return StateBytes(round(number), round(size * number), round(4 * number), round(main), round(8 * owned))


def _estimated_activations(config: TrainConfig, hf_config: Mapping[str, Any], work: Workload) -> ActivationBytes:
    """Of the first stage: what TransformerEngine's layers keep, counted by hand."""
    actor, size, hidden = config.actor, BYTES[config.model.dtype], hf_config["hidden_size"]
    tokens = work.fullest.num_tokens / actor.cp
    heads, width = hf_config["num_attention_heads"], hf_config["intermediate_size"] / actor.tp
    head_dim = hf_config.get("head_dim") or hidden // heads
    if num_experts(hf_config):
        # A token's row goes to each of its experts, and comes back.
        width = hf_config["num_experts_per_tok"] * (expert_width(hf_config) + hidden) / actor.tp
    between = hidden / (actor.tp if actor.sequence_parallel else 1)
    kept = 6 * between + 4 * heads * head_dim / actor.tp + 3 * width
    recomputed = actor.recompute == "full"
    layers = layers_of_chunk(actor, hf_config["num_hidden_layers"], 0)
    held = size * tokens * (layers * (between if recomputed else kept))
    passing = size * tokens * (kept if recomputed else 2 * width)
    in_flight = most_in_flight(actor, 0, work.micro_batches)
    # The output layer's weight gradient, and hidden states that are scored.
    output = size * hidden * hf_config["vocab_size"] / actor.tp + 3 * size * tokens * hidden if actor.pp == 1 else 0
    update = sum(in_flight.values()) * held + passing + output
    return ActivationBytes(round(update), round(size * tokens * kept), (PassBytes(held, held, held, 0),), in_flight)
