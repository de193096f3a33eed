"""Seconds of a step, phase by phase, and what bounds each: a roofline with named shares of the peaks (gpus.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_riskpo.actor.flops import BACKWARD, ModelFlops, num_experts
from megatron_riskpo.algorithms.mismatch import needs_old_logprobs
from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_servers import transport_on_gpus
from megatron_riskpo.planning import gpus
from megatron_riskpo.planning.gpus import Gpu
from megatron_riskpo.planning.memory import RankMemory
from megatron_riskpo.planning.model_size import BYTES, count_parameters, engine_parameters, kv_bytes_per_token
from megatron_riskpo.planning.pipeline import bubble_share
from megatron_riskpo.planning.workload import Workload


@dataclass(frozen=True)
class PhaseTime:
    """One phase."""

    seconds: float
    bound: str
    """What takes most of it."""


@dataclass(frozen=True)
class StepTime:
    """A whole step."""

    phases: dict[str, PhaseTime]
    mfu: float
    """Model FLOPs of the update over what the GPUs could do meanwhile."""
    tokens_per_second: float
    """Response tokens a GPU, over the whole step."""
    overlapped: float = 0.0
    """Seconds in which servers sample while the trainer works: they count once."""

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values()) - self.overlapped


def plan_time(
    config: TrainConfig, hf_config: Mapping[str, Any], world_size: int, gpu: Gpu, work: Workload, memory: RankMemory
) -> StepTime:
    """Of a step; `memory` is any rank's."""
    flops = ModelFlops.from_hf_config(hf_config)
    targets = work.num_sequences * work.mean_response
    forward = (
        flops.per_token * work.num_tokens + flops.per_squared_length * work.squared_lengths + flops.per_target * targets
    )
    shared = _Shared(config, hf_config, world_size, gpu, work, forward)
    phases = {
        "rollout": _rollout(shared, memory.engine.kv_tokens),
        "reward": _reward(shared),
        "logprobs": _logprobs(shared),
        "update": _update(shared, memory),
        "sync": _sync(shared),
    }
    seconds = sum(phase.seconds for phase in phases.values())
    overlapped = _overlapped({name: phase.seconds for name, phase in phases.items()}, config.rollout.max_staleness)
    mfu = (1 + BACKWARD) * forward / (phases["update"].seconds * world_size * gpu.peak_flops)
    return StepTime(phases, mfu, targets / (seconds - overlapped) / world_size, overlapped)


def _overlapped(seconds: Mapping[str, float], max_staleness: int) -> float:
    """In the long run a step takes the longer of sampling and training, and the sync, in which servers stand still.
    One step ahead, the next responses are asked for once those of the step are graded; further ahead, servers never
    wait."""
    if not max_staleness:
        return 0.0
    training = seconds["logprobs"] + seconds["update"] + (seconds["reward"] if max_staleness > 1 else 0.0)
    return min(seconds["rollout"], training)


@dataclass(frozen=True)
class _Shared:
    """What all phases look at."""

    config: TrainConfig
    hf_config: Mapping[str, Any]
    world_size: int
    gpu: Gpu
    work: Workload
    forward: float
    """FLOPs of a forward pass over the step's sequences."""

    @property
    def matrix_rate(self) -> float:
        share = gpus.EXPERT_MATRIX_SHARE if num_experts(self.hf_config) else gpus.MATRIX_SHARE
        return self.gpu.peak_flops * share

    @property
    def data_parallel(self) -> int:
        actor = self.config.actor
        return self.world_size // (actor.tp * actor.cp * actor.pp)

    def wire(self, num_ranks: int) -> float:
        """Bytes/s between neighbours of a group of so many consecutive ranks."""
        rate = self.gpu.link_rate if num_ranks <= gpus.GPUS_A_NODE else self.gpu.network_rate
        return rate * gpus.LINK_SHARE


def _of(parts: Mapping[str, float]) -> PhaseTime:
    return PhaseTime(sum(parts.values()), max(parts, key=lambda part: parts[part]))


def _rollout(shared: _Shared, kv_tokens: int) -> PhaseTime:
    """Every engine decodes its sequences, as many at a time as its cache and max_num_seqs allow; the last long one
    decodes nearly alone."""
    config, work, gpu = shared.config, shared.work, shared.gpu
    vllm = config.rollout.engine == "vllm"
    rollout = config.rollout
    tp = rollout.tp if vllm else config.actor.tp * config.actor.pp
    on_servers = rollout.placement == "server"
    engines = len(rollout.server_urls) or rollout.servers if on_servers else max(1, shared.world_size // tp)
    sequences = work.num_sequences / engines
    context = work.mean_prompt + work.mean_response / 2
    together = max(1.0, min(sequences, rollout.max_num_seqs, kv_tokens / context))
    steps = max(sequences * work.mean_response / together, work.longest_response)
    busy = sequences * work.mean_response / steps
    cache = busy * context * kv_bytes_per_token(shared.hf_config, config.model.dtype, tp)
    reading = (_weights_read(shared, busy, tp) + cache) / (gpu.memory_rate * gpus.MEMORY_SHARE)
    flops = ModelFlops.from_hf_config(shared.hf_config)
    products = busy * (flops.per_token + flops.per_target) / tp / (gpu.peak_flops * gpus.PREFILL_SHARE)
    prefill = flops.per_token * work.num_prompts * work.mean_prompt
    prefill += flops.per_squared_length * work.num_prompts * work.mean_prompt**2
    return _of(
        {
            "memory bandwidth" if reading >= products else "matrix products": steps * max(reading, products),
            "overhead of decoding": steps * gpus.DECODE_STEP_OVERHEAD,
            "prefill": prefill / (engines * tp) / (gpu.peak_flops * gpus.PREFILL_SHARE),
        }
    )


def _weights_read(shared: _Shared, sequences: float, tp: int) -> float:
    """Bytes of weights that the fullest of an engine's ranks reads for one token of so many sequences: of experts,
    those that any of them chose."""
    hf_config, whole = shared.hf_config, shared.config.rollout.expert_parallel
    experts, chosen = num_experts(hf_config), 1.0
    if experts:
        chosen -= (1 - hf_config["num_experts_per_tok"] / experts) ** sequences
    size = BYTES[shared.config.model.dtype]
    return engine_parameters(hf_config, tp, expert_parallel=whole, chosen=chosen) * size


def _reward(shared: _Shared) -> PhaseTime:
    workers = shared.world_size * shared.config.rewards.workers
    return PhaseTime(shared.work.num_sequences * gpus.GRADING_SECONDS / workers, "graders")


def _logprobs(shared: _Shared) -> PhaseTime:
    """As often as the trainer scores: old log-probs, and those of the reference model."""
    config = shared.config
    recompute = config.actor.old_logprobs == "recompute"
    old = recompute and (config.actor.mini_batches > 1 or needs_old_logprobs(config.loss, config.mismatch))
    passes = int(old) + int(config.loss.kl_coefficient > 0)
    if not passes:
        return PhaseTime(0.0, "not needed")
    return _of({part: passes * seconds for part, seconds in _passes(shared, 1.0).items()})


def _update(shared: _Shared, memory: RankMemory) -> PhaseTime:
    """Forward, backward (twice the forward) and what is computed again; gradients over the wire; the optimizer."""
    config, state = shared.config, memory.state
    again = 1.0 if config.actor.recompute == "full" else 0.0
    parts = _passes(shared, 1 + BACKWARD + again)
    replicas = shared.data_parallel * config.actor.cp
    wire = shared.wire(replicas * config.actor.tp)
    steps, moved = config.actor.mini_batches, (replicas - 1) / replicas
    parts["gradients and weights between replicas"] = steps * moved * (state.gradients + state.parameters) / wire
    rate = shared.gpu.memory_rate * gpus.MEMORY_SHARE
    # Read and written: moments and main weights; read: gradients.
    parts["optimizer"] = steps * (2 * state.optimizer + state.gradients / replicas) / rate
    if config.actor.offload_optimizer:
        parts["optimizer from and to the host"] = steps * 2 * state.optimizer / HOST_RATE
    return _of(parts)


HOST_RATE = 40e9
"""Bytes/s between host and GPU, page-locked. Assumed: PCIe 5.0 x16 has 63e9."""


def _passes(shared: _Shared, forwards: float) -> dict[str, float]:
    """Seconds of so many forward passes' work through the pipeline."""
    config, work, hf_config = shared.config, shared.work, shared.hf_config
    actor = config.actor
    compute = forwards * shared.forward / shared.world_size / shared.matrix_rate
    tokens = work.num_tokens / shared.data_parallel / actor.cp
    hidden = tokens * hf_config["hidden_size"] * BYTES[config.model.dtype]
    layers = hf_config["num_hidden_layers"] / actor.pp
    # All-gather and reduce-scatter around attention and around the MLP, each way.
    exchanged = 4 * layers * hidden * (actor.tp - 1) / actor.tp
    parts = {"matrix products": compute, "tensor parallelism": forwards * exchanged / shared.wire(actor.tp)}
    if actor.ep * actor.etp > 1:
        routed = 2 * layers * hidden * hf_config["num_experts_per_tok"] / (actor.tp if actor.sequence_parallel else 1)
        # All-to-all over the experts' ranks; then all tokens of the ranks that split an expert go to each of these.
        exchanged = routed * ((actor.ep - 1) / actor.ep + actor.etp - 1)
        parts["tokens between experts"] = forwards * exchanged / shared.wire(actor.ep * actor.etp)
    parts["pipeline bubble"] = sum(parts.values()) * bubble_share(actor, work.micro_batches)
    return parts


def _sync(shared: _Shared) -> PhaseTime:
    """Every vLLM rank gets its own shard; through files rank 0 the whole model, which goes through the host."""
    config = shared.config
    if config.rollout.engine != "vllm":
        return PhaseTime(0.0, "not needed")
    size, tp = BYTES[config.model.dtype], config.rollout.tp
    shard = size * engine_parameters(shared.hf_config, tp, expert_parallel=config.rollout.expert_parallel)
    if config.rollout.placement == "colocated":
        return _of(_between_ranks(shared, shard))
    way = transport_on_gpus(config)
    if way == "file":
        weights = size * count_parameters(shared.hf_config)
        return _of(_between_ranks(shared, weights) | {"files in the host's memory": weights / gpus.FILE_RATE})
    if way == "shared_memory":  # read by the worker, and vLLM's own copy
        return _of({"copies": _copies(shared, 2 * shard), "weights from GPU to GPU": shard / shared.wire(1)})
    engines = len(config.rollout.server_urls) or config.rollout.servers
    # A worker takes its shard, a rank gives its part of all shards.
    busiest = max(shard, shard * engines * tp / shared.world_size)
    network = shared.gpu.network_rate * gpus.LINK_SHARE
    return _of({"copies": _copies(shared, 3 * busiest), "weights to the servers": busiest / network})


def _between_ranks(shared: _Shared, moved: float) -> dict[str, float]:
    """So many bytes to each rank that takes weights, from those that have them."""
    actor = shared.config.actor
    # Stages lie one after the other over the ranks; within a stage the nearest rank that has a slice gives it.
    of_others, in_stage = moved * (actor.pp - 1) / actor.pp, max(actor.tp, actor.ep * actor.etp)
    return {
        "copies": _copies(shared, 3 * moved),  # into the bucket, out of it, and vLLM's own
        "weights of other stages": of_others / shared.wire(shared.world_size),
        "weights between ranks": (moved - of_others) * (in_stage - 1) / in_stage / shared.wire(in_stage),
    }


def _copies(shared: _Shared, num_bytes: float) -> float:
    """Seconds to read and write so many bytes of a GPU's own memory."""
    return 2 * num_bytes / (shared.gpu.memory_rate * gpus.MEMORY_SHARE)
