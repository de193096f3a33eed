"""Memory of a rank, phase by phase."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_checks import max_sequence_length
from megatron_riskpo.config_servers import transport_on_gpus
from megatron_riskpo.planning.activations import ActivationBytes, rank_activations
from megatron_riskpo.planning.gpus import CONTEXT_BYTES, ENGINE_WORKSPACE, FRAGMENTATION, GIB, GPUS_A_NODE, Gpu
from megatron_riskpo.planning.model_size import (
    BYTES,
    engine_parameters,
    kv_bytes_per_token,
    largest_module,
    largest_tensor,
    torch_dtype,
)
from megatron_riskpo.planning.state_bytes import StateBytes, rank_state, stage_ranks
from megatron_riskpo.planning.workload import Workload

PHASES = ("load", "rollout", "logprobs", "update", "sync")


@dataclass(frozen=True)
class EngineBytes:
    """Of the rollout engine on one rank."""

    weights: int
    """0 where it samples from the actor's own."""
    kv_cache: int
    workspace: int
    kv_tokens: int
    """Tokens that the KV cache holds."""

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace


@dataclass(frozen=True)
class RankMemory:
    """Of one rank, in bytes."""

    rank: int
    stage: int
    state: StateBytes
    activations: ActivationBytes
    engine: EngineBytes
    phases: dict[str, dict[str, int]]
    """By phase, what makes up its highest mark."""
    host: int
    """On the host: state that waits there, reference weights."""

    @property
    def peak(self) -> int:
        """The highest mark of all phases."""
        return max(sum(items.values()) for items in self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))


def plan_memory(
    config: TrainConfig, hf_config: dict[str, Any], world_size: int, gpu: Gpu, work: Workload,
    ranks: list[int] | None = None,
) -> list[RankMemory]:  # fmt: skip
    """Of `ranks`; without them of the first of each pipeline stage, which holds as much as any other of its stage."""
    engine = engine_bytes(config, hf_config, gpu)
    ranks = stage_ranks(config.actor, world_size) if ranks is None else ranks
    return [_rank_memory(config, hf_config, world_size, work, engine, rank) for rank in ranks]


def _rank_memory(
    config: TrainConfig, hf_config: dict[str, Any], world_size: int, work: Workload, engine: EngineBytes, rank: int
) -> RankMemory:
    dtype = torch_dtype(config.model.dtype)
    state = rank_state(hf_config, config.actor, dtype, rank, world_size)
    activations = rank_activations(
        hf_config, config.actor, dtype, rank, world_size, work.fullest, work.micro_batches, on_gpu=True
    )
    return RankMemory(
        rank=rank,
        stage=rank * config.actor.pp // world_size,
        state=state,
        activations=activations,
        engine=engine,
        phases=phases(config, hf_config, state, activations, engine),
        host=host_bytes(config, state),
    )


def phases(
    config: TrainConfig, hf_config: Mapping[str, Any], state: StateBytes, activations: ActivationBytes,
    engine: EngineBytes,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """What makes up each phase's highest mark on the GPU."""
    offloaded = config.actor.offload_optimizer
    lasting = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizer": 0 if offloaded else state.optimizer,
        # Servers have GPUs of their own.
        "engine": 0 if config.rollout.placement == "server" else engine.total,
        "context": CONTEXT_BYTES,
    }
    copying = config.actor.distributed_optimizer
    built = {**lasting, "optimizer": 0 if offloaded else state.main_weights}
    # Megatron copies the weights into its buffers while those that were loaded are still there.
    mapped = {**lasting, "optimizer": 0, "engine": 0, "copy of weights": state.parameters if copying else 0}
    # vLLM gives weights and cache back when it sleeps, which is until the next sync.
    training = {**lasting, "engine": engine.workspace} if config.rollout.sleep else lasting
    passing = {**training, "activations": _with_gaps(activations.update)}
    stepping = {**training, "optimizer": state.optimizer}
    return {
        "load": _greater(built, mapped),
        "rollout": lasting,
        "logprobs": {**training, "activations": _with_gaps(activations.logprobs)},
        "update": _greater(passing, stepping),
        "sync": {**lasting, **_sync(config, hf_config)},
    }


def _sync(config: TrainConfig, hf_config: Mapping[str, Any]) -> dict[str, int]:
    """What bringing weights to the engine takes for a while, at most."""
    size, bucket = BYTES[config.model.dtype], round(config.bridge.bucket_mib * 2**20)
    if config.rollout.engine != "vllm":
        return {}
    if config.rollout.placement == "server":
        # Through files a tensor's pieces and the whole that is made of them; and a bucket of whole ones.
        whole = bucket + 2 * size * largest_tensor(hf_config)
        return {"buckets": {"file": whole, "network": 2 * bucket, "shared_memory": 0}[transport_on_gpus(config)]}
    # A module that is not complete yet has storage of its own.
    rollout = config.rollout
    module = size * largest_module(hf_config, rollout.tp, expert_parallel=rollout.expert_parallel)
    return {"buckets": 2 * bucket, "module": module}


def _greater(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return first if sum(first.values()) >= sum(second.values()) else second


def _with_gaps(activations: int) -> int:
    return round(activations * (1 + FRAGMENTATION))


def engine_bytes(config: TrainConfig, hf_config: Mapping[str, Any], gpu: Gpu) -> EngineBytes:
    """What vLLM makes of its share of the GPU, or the KV cache of the built-in sampler."""
    rollout, dtype = config.rollout, config.model.dtype
    if rollout.engine == "megatron":
        per_token = kv_bytes_per_token(hf_config, dtype, config.actor.tp) // config.actor.pp
        tokens = rollout.max_num_seqs * max_sequence_length(config)
        return EngineBytes(0, tokens * per_token, 0, tokens)
    weights = engine_parameters(hf_config, rollout.tp, expert_parallel=rollout.expert_parallel) * BYTES[dtype]
    share = int(rollout.gpu_memory_utilization * gpu.memory)
    cache = max(0, share - weights - ENGINE_WORKSPACE)
    return EngineBytes(weights, cache, ENGINE_WORKSPACE, cache // kv_bytes_per_token(hf_config, dtype, rollout.tp))


def host_bytes(config: TrainConfig, state: StateBytes) -> int:
    """Of one rank."""
    waiting = state.optimizer if config.actor.offload_optimizer else 0
    return waiting + (state.parameters if config.loss.kl_coefficient else 0)


def complaints(config: TrainConfig, memory: list[RankMemory], gpu: Gpu) -> list[str]:
    """What does not fit, with the numbers and what would help."""
    engine, longest = memory[0].engine, max_sequence_length(config)
    found = []
    if engine.kv_tokens < longest:
        found.append(
            f"rollout.gpu_memory_utilization = {config.rollout.gpu_memory_utilization:g} leaves vLLM a KV cache of "
            f"{engine.kv_tokens} tokens beside {engine.weights / GIB:.1f} GiB of weights, a sequence has up to "
            f"{longest}; raise it, or rollout.tp"
        )
    worst = max(memory, key=lambda rank: rank.peak)
    if worst.peak > gpu.memory:
        found.append(
            f"phase {worst.peak_phase} needs {worst.peak / GIB:.1f} GiB on rank {worst.rank}, an {gpu.name} has "
            f"{gpu.memory / GIB:.1f}; {_remedy(config, worst)}"
        )
    return found


def _remedy(config: TrainConfig, rank: RankMemory) -> str:
    items, actor = rank.phases[rank.peak_phase], config.actor
    ways = []
    if items.get("activations", 0) > items["parameters"] and actor.recompute != "full":
        ways.append('set actor.recompute to "full"')
    elif items.get("activations", 0) > items["parameters"]:
        ways.append(f"lower actor.micro_batch_tokens below {actor.micro_batch_tokens}")
    if items["optimizer"] and not actor.offload_optimizer:
        ways.append("set actor.offload_optimizer to true")
    ways.append(f"raise actor.tp or actor.pp, or take more than {GPUS_A_NODE} GPUs a replica" if actor.tp >= GPUS_A_NODE
                else "raise actor.tp or actor.pp")  # fmt: skip
    if items["engine"]:
        ways.append(f"lower rollout.gpu_memory_utilization below {config.rollout.gpu_memory_utilization:g}")
    return ", or ".join(ways)
