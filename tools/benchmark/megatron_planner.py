"""Megatron-Core's resharding planner on made-up metadata: what it would do on rank 0 of a large run, without the ranks.

Its `build_centralized_reshard_plan` gathers every rank's metadata, plans for all ranks on rank 0 and hands the plans
out. Here the two collectives are replaced by what they would have brought, so that only planning is measured: no
exchange, no module. It moves weights between two Megatron models, so its target is a Megatron model of vLLM's
tensor-parallel size, not vLLM's own storage; it knows no buckets. Dense models only: its metadata of experts comes
from real modules.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.resharding import planner
from megatron.core.resharding.utils import ParameterMetadata
from torch import nn

from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout

_WHOLE = (("input_layernorm.weight", 1), ("pre_mlp_layernorm.weight", 1))


def seconds_for_all_ranks(
    hf_config: Mapping[str, Any], actor: ActorLayout, rollout: RolloutLayout
) -> tuple[float, int]:
    """Processor time of the plan of the whole world, and how many transfers rank 0 gets from it."""
    target = ActorLayout(rollout.num_ranks, tp=rollout.tp)
    source_metadata = [list(_metadata(hf_config, actor, rank)) for rank in range(actor.world_size)]
    target_metadata = [list(_metadata(hf_config, target, rank)) for rank in range(actor.world_size)]
    answers = iter((source_metadata, target_metadata))

    def gather(into: list[Any], _: Any) -> None:
        into[:] = next(answers)

    module = nn.Module()
    module.pg_collection = object()  # type: ignore[assignment]
    with (
        mock.patch.object(dist, "get_rank", return_value=0),
        mock.patch.object(dist, "get_world_size", return_value=actor.world_size),
        mock.patch.object(dist, "all_gather_object", gather),
        mock.patch.object(dist, "broadcast_object_list"),
        mock.patch.object(planner, "_build_layer_module_prefix_map", return_value={}),
    ):
        start = time.process_time()
        plan = planner.build_centralized_reshard_plan(module, module)
        return time.process_time() - start, len(plan.recv_ops)


def _metadata(hf_config: Mapping[str, Any], layout: ActorLayout, rank: int) -> Iterator[ParameterMetadata]:
    stage, in_stage = divmod(rank, layout.stage_size)
    tp_rank, first = in_stage % layout.tp, stage * layout.stage_size
    groups = {
        "owner_rank": rank,
        "tensor_parallel_group_ranks": list(range(rank - tp_rank, rank - tp_rank + layout.tp)),
        "data_parallel_group_ranks": list(range(first + tp_rank, first + layout.stage_size, layout.tp)),
        "pipeline_parallel_group_ranks": list(range(in_stage, layout.world_size, layout.stage_size)),
    }
    for name, shape, dim in _parameters(hf_config, layout, stage):
        local = tuple(size // layout.tp if i == dim else size for i, size in enumerate(shape))
        yield ParameterMetadata(
            name, local, torch.bfloat16, 2, is_tp=dim is not None, partition_dim=dim or 0, resolved_name=name, **groups
        )  # fmt: skip


def _parameters(
    hf_config: Mapping[str, Any], layout: ActorLayout, stage: int
) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """(name, whole shape, dimension that is split) of a stage's Megatron parameters, Qwen2's."""
    hidden, width = hf_config["hidden_size"], hf_config["intermediate_size"]
    size = hidden // hf_config["num_attention_heads"]
    rows = (hf_config["num_attention_heads"] + 2 * hf_config["num_key_value_heads"]) * size
    if stage == 0:
        yield "embedding.word_embeddings.weight", (hf_config["vocab_size"], hidden), 0
    for layer in layout.stage_layers(stage, hf_config["num_hidden_layers"]):
        prefix = f"decoder.layers.{layer}."
        for name, _ in _WHOLE:
            yield prefix + name, (hidden,), None
        yield prefix + "self_attention.linear_qkv.weight", (rows, hidden), 0
        yield prefix + "self_attention.linear_qkv.bias", (rows,), 0
        yield prefix + "self_attention.linear_proj.weight", (hidden, hidden), 1
        yield prefix + "mlp.linear_fc1.weight", (2 * width, hidden), 0
        yield prefix + "mlp.linear_fc2.weight", (hidden, width), 1
    if stage == layout.pp - 1:
        yield "decoder.final_layernorm.weight", (hidden,), None
        yield "output_layer.weight", (hf_config["vocab_size"], hidden), 0
