"""The policy: Megatron's GPTModel that can give log-probs and entropy of chosen tokens instead of logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_riskpo.actor.logprobs import vocab_parallel_logprobs
from megatron_riskpo.actor.model_config import rope_base, transformer_config
from megatron_riskpo.actor.packing import MicroBatch
from megatron_riskpo.actor.specs import block_spec
from megatron_riskpo.checkpoint.weight_map import shape_of
from megatron_riskpo.checkpoint.weight_map.base import padded_vocab_size
from megatron_riskpo.config import ActorConfig
from megatron_riskpo.distributed.grid import RankGrid


@dataclass(frozen=True)
class Scoring:
    """Asks the model for the log-probs of a micro-batch's targets."""

    predictor: Tensor
    """int64 [n]: positions in the pack."""
    targets: Tensor
    """int64 [n]: token ids."""
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
        return vocab_parallel_logprobs(hidden, weight, scoring.targets, first_id, num_real, scoring.temperature, tp)


def build_policy_model(
    hf_config: dict[str, Any], actor: ActorConfig, dtype: torch.dtype, grid: RankGrid
) -> PolicyModel:
    """This rank's part of the model, with Megatron's random initial weights."""
    shape = shape_of(hf_config)
    config = transformer_config(hf_config, actor, dtype)
    return PolicyModel(
        config=config,
        transformer_layer_spec=block_spec(config, grid.pp.rank()),  # type: ignore[arg-type]
        vocab_size=padded_vocab_size(shape.vocab_size, actor.tp),
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=grid.is_first_stage,
        post_process=grid.is_last_stage,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=rope_base(hf_config),  # type: ignore[arg-type]
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        real_vocab_size=shape.vocab_size,
    )


def score_micro_batch(model: nn.Module, batch: MicroBatch, temperature: float) -> Tensor | tuple[Tensor, Tensor]:
    """One forward pass: log-probs and entropies, both float32 [n], on the last pipeline stage; hidden states on the
    others."""
    return model(
        batch.input_ids,
        batch.position_ids,
        None,
        packed_seq_params=batch.packed,
        scoring=Scoring(batch.predictor, batch.targets, temperature),
    )


_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def named_parameters(model: PolicyModel) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters under the names of the weight tables: layers counted over the whole model, and
    TransformerEngine's fused norms called as the local modules call them."""
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            prefix, _, rest = name.partition(".layers.")
            index, _, rest = rest.partition(".")
            layer = cast(TransformerLayer, model.decoder.layers[int(index)]).layer_number - 1
            rest = _FUSED_NORMS.get(rest, rest)
            name = f"{prefix}.layers.{layer}.{rest}"
        yield name, parameter
