"""Decoding with a KV cache on the actor's own Megatron module: one pipeline stage of one batch."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_riskpo.actor.model import PolicyModel
from megatron_riskpo.distributed.grid import RankGrid

_SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextlib.contextmanager
def decoding_form(model: PolicyModel) -> Iterator[None]:
    """Eval mode, no gradients, sequence parallelism off (a decoded length of 1 does not divide by tp); what was
    before is restored. Not torch's inference_mode: Megatron caches rotary embeddings, and an inference tensor in
    that cache would break the next training step. Not Megatron's set_model_to_sequence_parallel: it remembers
    modules by id() for ever.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    owners = [*configs.values(), *model.modules()]
    switched = [(o, name) for o in owners for name in _SEQUENCE_PARALLEL_SWITCHES if getattr(o, name, None) is True]
    was_training = model.training
    try:
        model.eval()
        for owner, name in switched:
            setattr(owner, name, False)
        with torch.no_grad():
            yield
    finally:
        for owner, name in switched:
            setattr(owner, name, True)
        model.train(was_training)


class CachedDecoder:
    """This rank's part of a batch's KV cache. All sequences have equally many tokens in it.

    Legend: b sequences, s new tokens, h hidden size, v real vocabulary size, g key-value heads of this rank.
    """

    def __init__(self, model: PolicyModel, grid: RankGrid, num_sequences: int, max_length: int) -> None:
        """`max_length`: tokens a sequence that the cache has room for."""
        self._model = model
        self._grid = grid
        self._context = StaticInferenceContext(num_sequences, max_length)

    def step(self, tokens: Tensor) -> Tensor | None:
        """Append tokens, int64 [b, s]: the logits [b, v] of what follows on the last stage, None on the others.
        Collective over the tensor- and pipeline-parallel groups."""
        num_sequences, num_new = tokens.shape
        start = self._context.sequence_len_offset
        positions = torch.arange(start, start + num_new, device=tokens.device).expand(num_sequences, -1)
        if not self._grid.is_first_stage:
            self._model.set_input_tensor(self._receive(num_new, num_sequences, tokens.device))
        output = self._model(tokens, positions, None, inference_context=self._context, runtime_gather_output=True)
        self._context.increment_sequence_len_offset(num_new)
        self._context.enable_decode_mode()
        if not self._grid.is_last_stage:
            dist.send(output.contiguous(), self._stage_rank(+1), group=self._grid.pp)
            return None
        return output[:, -1, : self._model.real_vocab_size]

    def select(self, rows: Tensor) -> None:
        """Keep the given sequences (int64 indices), in that order; an index may stand there many times."""
        length = self._context.sequence_len_offset
        for layer, caches in self._context.key_value_memory_dict.items():
            self._context.key_value_memory_dict[layer] = tuple(_select(cache, rows, length) for cache in caches)

    def _receive(self, num_new: int, num_sequences: int, device: torch.device) -> Tensor:
        config = self._model.config
        hidden = torch.empty(num_new, num_sequences, config.hidden_size, dtype=config.pipeline_dtype, device=device)
        dist.recv(hidden, self._stage_rank(-1), group=self._grid.pp)
        return hidden

    def _stage_rank(self, offset: int) -> int:
        return dist.get_global_rank(self._grid.pp, self._grid.pp.rank() + offset)


def _select(cache: Tensor, rows: Tensor, length: int) -> Tensor:
    """cache [max_length, b, g, head size]; only the first `length` positions hold anything."""
    selected = cache.new_empty(cache.size(0), rows.numel(), *cache.shape[2:])
    torch.index_select(cache[:length], 1, rows, out=selected[:length])
    return selected
