"""This rank's part of the weights, from a Hugging Face folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from megatron_riskpo.actor.model import PolicyModel, named_parameters
from megatron_riskpo.checkpoint.hf_folder import HfReader
from megatron_riskpo.checkpoint.weight_map.base import Family, ModelShape, Rule, padded_vocab_size
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.errors import UsageError


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[PolicyModel], model_dir: str | Path, family: Family, shape: ModelShape, grid: RankGrid
) -> None:
    """Fill this rank's parameters from a Hugging Face folder.

    Raises UsageError for a missing tensor, a tensor that the family does not know, or another shape.
    """
    reader = HfReader(model_dir)
    rules = {rule.megatron: rule for rule in family.rules(shape)}
    if shape.tied_embeddings:
        # With pipeline stages a tied model keeps a copy of the embedding in its last stage.
        rules["output_layer.weight"] = rules["embedding.word_embeddings.weight"]
    _refuse_unknown(reader, rules.values(), shape)
    for name, parameter in named_parameters(chunks):
        rule = rules[name]
        num_rows = None
        if rule.is_vocab:
            _check_vocab(reader, rule.hf[0], shape)
            num_rows = padded_vocab_size(shape.vocab_size, grid.tp.size())
        group = grid.split_group(of_expert=rule.expert is not None)
        pieces = [reader.read(hf, rule.shard_dim, group.rank(), group.size(), num_rows) for hf in rule.hf]
        value = rule.fusion.fuse(pieces, shape)
        if value.shape != parameter.shape:
            raise UsageError(
                f"{model_dir}: {' + '.join(rule.hf)} give shape {list(value.shape)} on this rank, "
                f"config.json asks for {list(parameter.shape)}"
            )
        parameter.copy_(value)


def _check_vocab(reader: HfReader, name: str, shape: ModelShape) -> None:
    # Before it is padded: then it would fit any size.
    rows = reader.shape(name)[0]
    if rows != shape.vocab_size:
        raise UsageError(
            f"{reader.model_dir}: {name} has {rows} rows, config.json says vocab_size = {shape.vocab_size}"
        )


def _refuse_unknown(reader: HfReader, rules: Iterable[Rule], shape: ModelShape) -> None:
    known = {name for rule in rules for name in rule.hf}
    if shape.tied_embeddings:
        known.add("lm_head.weight")  # some writers store the tied head again
    unknown = sorted(reader.names - known)
    if unknown:
        raise UsageError(f"{reader.model_dir}: {len(unknown)} tensors unknown to this model type, first {unknown[0]}")
