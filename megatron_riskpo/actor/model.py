"""The policy: Megatron's GPTModel that can give log-probs and entropy of chosen tokens instead of logits."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_riskpo.actor.logprobs import vocab_parallel_logprobs
from megatron_riskpo.actor.model_config import transformer_config
from megatron_riskpo.actor.packing import MicroBatch
from megatron_riskpo.actor.rotary import rotary_frequencies
from megatron_riskpo.actor.specs import block_spec
from megatron_riskpo.checkpoint.weight_map import shape_of
from megatron_riskpo.checkpoint.weight_map.base import padded_vocab_size
from megatron_riskpo.checkpoint.weight_map.stored import FUSED_NORMS
from megatron_riskpo.config import ActorConfig
from megatron_riskpo.distributed.grid import RankGrid


@dataclass(frozen=True)
class Scoring:
    """Asks the model for the log-probs of a micro-batch's targets."""

    predictor: Tensor
    """int64 [m]: places among this rank's tokens."""
    targets: Tensor
    """int64 [m]: token ids."""
    slots: Tensor
    """int64 [m]: which of the n targets of the micro-batch these are; under context parallelism other ranks have the
    others."""
    num_targets: int
    """n."""
    temperature: float


class PolicyModel(GPTModel):
    """With `scoring` the last stage returns log-probs and entropies (nats) of the targets, both float32 [n]. They are
    two tensors so that a loss without the entropy has no gradient for it.

    Only the hidden states that predict a target go through the output layer.
    """

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None,
                *args: Any, scoring: Scoring | None = None,
                **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        if scoring is None:
            return super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)
        packed = kwargs["packed_seq_params"]
        decoder_input, rotary_pos_emb, rotary_cos, rotary_sin, offset, padding_mask = self._preprocess(
            input_ids=input_ids, position_ids=position_ids, packed_seq_params=packed
        )[:6]
        hidden = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            rotary_pos_cos=rotary_cos,
            rotary_pos_sin=rotary_sin,
            packed_seq_params=packed,
            sequence_len_offset=offset,
            padding_mask=padding_mask,
        )
        return self._score(hidden, scoring) if self.post_process else hidden

    def _score(self, hidden: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
        tp = self.pg_collection.tp
        # Either mapping adds up the gradients of the ranks, which hold a shard of the vocabulary each.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp)
            hidden = hidden.index_select(0, scoring.predictor)[:, 0]
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden.index_select(0, scoring.predictor)[:, 0], group=tp)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        first_id = tp.rank() * weight.size(0)
        # The vocabulary is padded at its end so that tp divides it.
        num_real = max(0, min(weight.size(0), self.real_vocab_size - first_id))
        logprobs, entropies = vocab_parallel_logprobs(
            hidden, weight, scoring.targets, first_id, num_real, scoring.temperature, tp
        )
        return self._join_context(logprobs, scoring), self._join_context(entropies, scoring)

    def _join_context(self, values: Tensor, scoring: Scoring) -> Tensor:
        """[m] of this rank's targets -> [n] of all, on every context-parallel rank.

        Every one of them then computes the whole loss; the way back hands each the gradient of its own targets.
        """
        cp = self.pg_collection.cp
        if cp.size() == 1:
            return values
        joined = values.new_zeros(scoring.num_targets).index_copy(0, scoring.slots, values)
        return reduce_from_tensor_model_parallel_region(joined, group=cp)


def build_policy_model(
    hf_config: dict[str, Any], actor: ActorConfig, dtype: torch.dtype, grid: RankGrid
) -> list[PolicyModel]:
    """This rank's part of the model, one module a virtual pipeline stage, with Megatron's random initial weights."""
    shape = shape_of(hf_config)
    config = transformer_config(hf_config, actor, dtype)
    frequencies = rotary_frequencies(hf_config, shape.head_dim)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = []
    for chunk in range(actor.vp):
        vp_stage = chunk if actor.vp > 1 else None
        model = PolicyModel(
            config=config,
            transformer_layer_spec=block_spec(config, grid.pp.rank(), vp_stage),  # type: ignore[arg-type]
            vocab_size=padded_vocab_size(shape.vocab_size, actor.tp),
            max_sequence_length=hf_config["max_position_embeddings"],
            pre_process=grid.is_first_stage and chunk == 0,
            post_process=grid.is_last_stage and chunk == actor.vp - 1,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=vp_stage,
            real_vocab_size=shape.vocab_size,
        )
        # Megatron knows fewer ways to scale them than config.json does.
        model.rotary_pos_emb.inv_freq = frequencies.to(grid.device)
        _reduce_over_experts(model)
        chunks.append(model)
    return chunks


def _reduce_over_experts(model: PolicyModel) -> None:
    """Let the gradients of experts be summed over the ranks that hold the same part of the same expert.

    Megatron marks them so only where expert_model_parallel_size > 1, and else sums over the replicas of the other
    weights. Those are other ranks wherever tp and etp differ: with tensor parallelism and whole experts all of its
    ranks hold the same experts, and see different tokens.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def score_micro_batch(model: nn.Module, batch: MicroBatch, temperature: float) -> Tensor | tuple[Tensor, Tensor]:
    """One forward pass: log-probs and entropies, both float32 [n], on the last pipeline stage; hidden states on the
    others."""
    return model(
        batch.input_ids,
        batch.position_ids,
        None,
        packed_seq_params=batch.packed,
        scoring=Scoring(batch.predictor, batch.targets, batch.slots, batch.num_targets, temperature),
    )


_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)")


def named_parameters(chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters under the names of the weight tables: layers and experts counted over the whole model,
    and TransformerEngine's fused norms and grouped experts called as the local modules call them."""
    for model in chunks:
        for name, parameter in model.named_parameters():
            yield _table_name(model, name), parameter


def _table_name(model: PolicyModel, name: str) -> str:
    if ".layers." not in name:
        return name
    prefix, _, rest = name.partition(".layers.")
    index, _, rest = rest.partition(".")
    layer = cast(TransformerLayer, model.decoder.layers[int(index)]).layer_number - 1
    rest = FUSED_NORMS.get(rest, rest)
    if match := _LOCAL_EXPERT.fullmatch(rest):
        rest = _expert_name(model, int(match[1]), match[2])
    elif match := _GROUPED_EXPERT.fullmatch(rest):
        rest = _expert_name(model, int(match[2]), match[1])
    return f"{prefix}.layers.{layer}.{rest}"


def _expert_name(model: PolicyModel, local: int, weight: str) -> str:
    config = model.config
    num_local = cast(int, config.num_moe_experts) // config.expert_model_parallel_size
    return f"mlp.experts.local_experts.{model.pg_collection.ep.rank() * num_local + local}.{weight}"
