"""Memory of activations: passes of the real modules on tensors without memory, one and two layers deep.

Everything that a pass holds or needs grows by the same amount a layer, so two depths say it for any.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from megatron_riskpo.config import ActorConfig
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.planning.fake_world import fake_rank, without_memory
from megatron_riskpo.planning.gpu_kernels import gpu_kernels
from megatron_riskpo.planning.live_bytes import LiveBytes
from megatron_riskpo.planning.pipeline import layers_of_chunk, most_in_flight
from megatron_riskpo.planning.state_bytes import storage_bytes

if TYPE_CHECKING:
    from megatron_riskpo.actor.packing import MicroBatch

NUM_CHUNKS = 2
"""Pieces of the vocabulary that a planned pass goes through: each uses the memory of the one before."""


@dataclass(frozen=True)
class Lengths:
    """The sequences of a micro-batch, whole ones (before context parallelism splits them), in tokens."""

    prompts: tuple[int, ...]
    responses: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.prompts) + sum(self.responses)


@dataclass(frozen=True)
class PassBytes:
    """Of one micro-batch in one virtual stage, in bytes beyond the rank's state."""

    held: float
    """From the end of the forward pass to the backward pass."""
    peak: float
    """Most during forward and backward pass, what is held included."""
    forward_peak: float
    """Most during a forward pass without a backward pass, what is kept included."""
    kept: float
    """From the first pass on: Megatron's buffer for gathered activations (sequence parallelism). Not in the first
    two."""

    def deeper(self, other: "PassBytes", num_layers: int) -> "PassBytes":
        """Self is of one layer, `other` of two: of num_layers."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return PassBytes(*(one + (two - one) * (num_layers - 1) for one, two in pairs))


@dataclass(frozen=True)
class ActivationBytes:
    """Of a rank, in bytes beyond its state."""

    update: int
    """Most in the update phase."""
    logprobs: int
    """Most in a pass that only scores."""
    chunks: tuple[PassBytes, ...]
    """Of one micro-batch in each of the rank's virtual stages."""
    in_flight: dict[int, int]
    """Micro-batches that wait in each of them for their backward pass, at most."""


def rank_activations(
    hf_config: dict[str, Any], actor: ActorConfig, dtype: torch.dtype, rank: int, world_size: int, lengths: Lengths,
    num_micro_batches: int, *, on_gpu: bool,
) -> ActivationBytes:  # fmt: skip
    """Of rank `rank`, every micro-batch of which holds sequences of the given lengths.

    on_gpu: with the kernels that a GPU fuses, else as on a CPU. Experts get equally many tokens each.
    """
    with fake_rank(rank, world_size, actor) as grid:
        one, two = (_chunk_passes(hf_config, actor, dtype, grid, lengths, depth, on_gpu) for depth in (1, 2))
        stage = grid.pp.rank()
    depth = layers_of_chunk(actor, hf_config["num_hidden_layers"], stage)
    chunks = tuple(shallow.deeper(deep, depth) for shallow, deep in zip(one, two, strict=True))
    in_flight = most_in_flight(actor, stage, num_micro_batches)
    return ActivationBytes(
        update=round(_most(chunks, in_flight)),
        logprobs=round(max(chunk.forward_peak for chunk in chunks)),
        chunks=chunks,
        in_flight=in_flight,
    )


def _most(chunks: Sequence[PassBytes], in_flight: dict[int, int]) -> float:
    """All wait, and the pass with the greatest need above what it holds is under way."""
    waiting = sum(chunks[chunk].held * count for chunk, count in in_flight.items())
    above = max(chunks[chunk].peak - chunks[chunk].held for chunk in in_flight)
    return waiting + above + max(chunk.kept for chunk in chunks)


def _chunk_passes(
    hf_config: dict[str, Any], actor: ActorConfig, dtype: torch.dtype, grid: RankGrid, lengths: Lengths, depth: int,
    on_gpu: bool,
) -> list[PassBytes]:  # fmt: skip
    """Of the rank's virtual stages if each had `depth` layers."""
    from megatron_riskpo.actor.actor import wrap_for_training
    from megatron_riskpo.actor.model import build_policy_model

    shallow = {**hf_config, "num_hidden_layers": depth * actor.pp * actor.vp}
    even = dataclasses.replace(actor, first_stage_layers=0, last_stage_layers=0)
    batch = _micro_batch(lengths, actor, grid)
    with _as_planned(on_gpu), without_memory():
        chunks = build_policy_model(shallow, even, dtype, grid)
        _fuse(chunks, on_gpu)
        _balance_experts(chunks)
        return [_passes(model, chunk, batch) for model, chunk in zip(wrap_for_training(chunks, even, dtype), chunks,
                                                                     strict=True)]  # fmt: skip


def _micro_batch(lengths: Lengths, actor: ActorConfig, grid: RankGrid) -> "MicroBatch":
    from megatron_riskpo.actor.packing import pack
    from megatron_riskpo.actor.sequence_split import SequenceSplit
    from megatron_riskpo.rollout.types import Rollouts

    num = len(lengths.prompts)
    rollouts = Rollouts(
        tokens=torch.zeros(lengths.num_tokens, dtype=torch.long),
        prompt_lengths=torch.tensor(lengths.prompts),
        response_lengths=torch.tensor(lengths.responses),
        rollout_logprobs=torch.zeros(sum(lengths.responses)),
        finished=torch.ones(num, dtype=torch.bool),
    )
    split = SequenceSplit(actor.cp, grid.cp.rank(), actor.tp if actor.sequence_parallel else 1)
    batch = pack(rollouts, range(num), split, torch.device("cpu"))
    # Worked out at the first use, which here must come while numbers can be looked at.
    _ = batch.packed.buckets
    return batch


@contextlib.contextmanager
def _as_planned(on_gpu: bool) -> Iterator[None]:
    """The output layer takes the vocabulary in pieces of the size that the device likes, the first ones only."""
    from megatron_riskpo.actor import logprobs

    whole = logprobs._Plan.chunks
    sizes = {"cpu": logprobs.CHUNK_ELEMENTS["cuda" if on_gpu else "cpu"]}
    with (
        gpu_kernels() if on_gpu else contextlib.nullcontext(),
        mock.patch.dict(logprobs.CHUNK_ELEMENTS, sizes),
        mock.patch.object(logprobs._Plan, "chunks", lambda plan: itertools.islice(whole(plan), NUM_CHUNKS)),
    ):
        yield


def _fuse(chunks: Sequence[Any], on_gpu: bool) -> None:
    """What transformer_config switches on where there is a GPU and what changes memory: SwiGLU keeps its input only."""
    for chunk in chunks:
        chunk.config.bias_activation_fusion = on_gpu


def _balance_experts(chunks: Sequence[Any]) -> None:
    """Give each expert its even share of the tokens, which tensors without values could not choose."""
    for chunk in chunks:
        if not chunk.config.num_moe_experts:
            continue
        chunk.config.moe_expert_capacity_factor = 1.0
        chunk.config.moe_pad_expert_input_to_capacity = True
        for module in chunk.modules():
            if hasattr(module, "token_dispatcher"):
                module.token_dispatcher.drop_and_pad = True
                module.token_dispatcher.moe_expert_capacity_factor = 1.0


def _passes(model: Any, chunk: Any, batch: "MicroBatch") -> PassBytes:
    from megatron.core.parallel_state import get_global_memory_buffer

    from megatron_riskpo.actor.model import score_micro_batch

    known, buffers = _tensors_of(model), get_global_memory_buffer().buffer
    buffers.clear()
    with torch.no_grad(), LiveBytes(known) as live:
        _feed(chunk, batch, requires_grad=False)
        score_micro_batch(model, batch, 1.0)
        forward_peak = live.peak
    kept = storage_bytes(buffers.values())
    with LiveBytes([*known, *buffers.values()]) as live:
        _feed(chunk, batch, requires_grad=True)
        out = score_micro_batch(model, batch, 1.0)
        held = live.current
        # The last stage gives log-probs and entropies, of which the loss takes the first.
        last = out[0] if isinstance(out, tuple) else out
        torch.autograd.backward(last, torch.empty_like(last))
        del out, last
        chunk.set_input_tensor(None)
    return PassBytes(held, live.peak, forward_peak, kept)


def _feed(chunk: Any, batch: "MicroBatch", *, requires_grad: bool) -> None:
    """What the stage before would send."""
    if chunk.pre_process:
        return
    config, num_tokens = chunk.config, batch.input_ids.size(1)
    rows = num_tokens // config.tensor_model_parallel_size if config.sequence_parallel else num_tokens
    hidden = torch.empty(rows, 1, config.hidden_size, dtype=config.params_dtype, requires_grad=requires_grad)
    chunk.set_input_tensor(hidden)


def _tensors_of(model: Any) -> list[Tensor]:
    parameters = list(model.parameters())
    # DDP has an attribute of its own called buffers.
    return [*parameters, *(parameter.main_grad for parameter in parameters), *model.module.buffers()]
