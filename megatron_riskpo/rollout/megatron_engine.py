"""The built-in sampler: KV-cached decoding on the actor's own module, under any tensor, pipeline, data layout.

A batch mixes prompts of several lengths without padding: the shortest prompt's length is prefilled, and from there
on longer prompts are fed token by token while shorter ones already sample. So every sequence always has equally many
tokens in the cache, which is all that Megatron's static context can hold, and no result depends on the batch.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_riskpo.actor.model import PolicyModel
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.errors import UsageError
from megatron_riskpo.rollout.cached_decoder import CachedDecoder, decoding_form
from megatron_riskpo.rollout.prompt_checks import check_prompts
from megatron_riskpo.rollout.replicas import Responses, gather_responses, in_turns, join_prompts, slice_of
from megatron_riskpo.rollout.sampling import choose_tokens, response_uniforms
from megatron_riskpo.rollout.types import OnFinished, Rollouts, SamplingConfig

COMPACT_BELOW = 0.8
"""Finished sequences leave the cache once fewer than this share of its rows is unfinished: a copy costs about one
step's key rotation, a row that stays costs every step."""


class MegatronEngine:
    """RolloutEngine on the actor's module itself, so an optimizer step is seen without any transfer.

    Samples are a function of weights, prompt, seed and response index (up to the rounding of matrix products, which
    may differ with batch and layout). At temperature 0 the log-probs reported are those at temperature 1.
    """

    shares_weights = True

    def __init__(self, model: PolicyModel, grid: RankGrid, max_sequence_length: int, max_num_seqs: int) -> None:
        """`max_sequence_length`: longest prompt + response, in tokens. `max_num_seqs`: sequences decoded at a time
        by one data-parallel rank; a batch's cache has room for its longest prompt + response."""
        if max_num_seqs < 1:
            raise UsageError(f"rollout.max_num_seqs = {max_num_seqs}, must be at least 1")
        self._model = model
        self._grid = grid
        self._max_sequence_length = max_sequence_length
        self._max_num_seqs = max_num_seqs
        self._weight_version = -1

    @property
    def weight_version(self) -> int:
        """What the last `update_weights` said; -1 before the first."""
        return self._weight_version

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, float]:
        """Note the version. `weights` are not read: they are the module's own, already there."""
        self._weight_version = version
        return {}

    def release(self) -> None:
        """Nothing is held between calls."""

    def close(self) -> None:
        """Nothing is held between calls."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> Rollouts:  # fmt: skip
        """See RolloutEngine. Prompts are dealt to the data-parallel ranks in contiguous slices."""
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        vocab_size = self._model.real_vocab_size
        check_prompts(prompts, sampling.max_response_tokens, self._max_sequence_length, vocab_size)
        mine = slice_of(len(prompts), self._grid.dp.size(), self._grid.dp.rank())
        with decoding_form(self._model):
            tell = in_turns(on_finished, mine.start * sampling.group_size, *self._turn())
            local = self._respond(prompts[mine], sampling, seeds[mine], tell)
        # Every rank of a model replica holds `local`, so the data-parallel group alone carries all of it.
        responses = gather_responses(local, len(prompts), sampling.group_size, tp=1, group=self._grid.dp)
        return join_prompts(prompts, sampling.group_size, responses)

    def _turn(self) -> tuple[int, int]:
        """(this rank within its model replica, number of the replica's ranks)"""
        tp, cp, pp = self._grid.tp, self._grid.cp, self._grid.pp
        return (pp.rank() * cp.size() + cp.rank()) * tp.size() + tp.rank(), tp.size() * cp.size() * pp.size()

    def _respond(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int], tell: OnFinished
    ) -> Responses:
        """This replica's responses; row p*G+g is response g to prompt p."""
        uniforms = response_uniforms(seeds, sampling.group_size, sampling.max_response_tokens)
        lengths = [len(prompt) for prompt in prompts for _ in range(sampling.group_size)]
        parts: list[Responses] = []
        order: list[int] = []
        for rows in plan_batches(lengths, self._max_num_seqs, sampling.max_response_tokens):
            batch = DecodingBatch([prompts[row // sampling.group_size] for row in rows], uniforms[rows], sampling)
            for index in self._decode(batch, [row // sampling.group_size for row in rows]):
                tell(rows[index], batch.response(index))
            parts.append(batch.responses(self._weight_version))
            order.extend(rows)
        return _in_row_order(parts, order)

    def _decode(self, batch: "DecodingBatch", prompt_of_row: Sequence[int]) -> Iterator[int]:
        """Run the batch to its end; each row as soon as it is done. Rows of one prompt share its prefill."""
        device = self._grid.device
        _, first_row, prompt_index = np.unique(prompt_of_row, return_index=True, return_inverse=True)
        decoder = CachedDecoder(self._model, self._grid, len(first_row), batch.max_length)
        logits = decoder.step(torch.from_numpy(batch.tokens[first_row, : batch.position]).to(device))
        rows = torch.from_numpy(prompt_index).to(device)
        decoder.select(rows)
        logits = logits[rows] if logits is not None else None
        while True:
            yield from batch.append(*self._choose(logits, batch.uniforms(), batch.temperature))
            if batch.done.all():
                return
            kept = batch.compact()
            if kept is not None:
                decoder.select(torch.from_numpy(kept).to(device))
            logits = decoder.step(torch.from_numpy(batch.last_tokens()).to(device))

    def _choose(
        self, logits: Tensor | None, uniforms: NDArray[np.float64], temperature: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and log-probs of the next tokens, on every rank. One rank chooses and the others are told: equal bits on
        all tensor-parallel ranks are likely, but a difference would let their caches part unseen."""
        grid = self._grid
        # Both in one message: float64 holds every token id and every float32 exactly.
        chosen = torch.empty(2, len(uniforms), dtype=torch.float64, device=grid.device)
        if logits is not None and grid.tp.rank() == 0:
            ids, logprobs = choose_tokens(logits, torch.from_numpy(uniforms).to(grid.device), temperature)
            chosen[0], chosen[1] = ids, logprobs
        if grid.tp.size() > 1 and grid.is_last_stage:
            dist.broadcast(chosen, dist.get_global_rank(grid.tp, 0), group=grid.tp)
        if grid.pp.size() > 1:
            dist.broadcast(chosen, dist.get_global_rank(grid.pp, grid.pp.size() - 1), group=grid.pp)
        on_cpu = chosen.cpu().numpy()
        return on_cpu[0].astype(np.int64), on_cpu[1].astype(np.float32)


def plan_batches(lengths: Sequence[int], max_num_seqs: int, max_spread: int) -> list[list[int]]:
    """Rows grouped by prompt length (in tokens): at most max_num_seqs a batch, whose lengths differ by at most
    max_spread. With max_spread = max_response_tokens feeding the longer prompts costs no more steps than a batch of
    their own would."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        fits = batches and len(batches[-1]) < max_num_seqs and lengths[row] - lengths[batches[-1][0]] <= max_spread
        if fits:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


class DecodingBatch:
    """Sequences decoded together: which token each gets next, and which are done. b rows, on the CPU."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], uniforms: NDArray[np.float64], sampling: SamplingConfig
    ) -> None:
        """prompts and uniforms [b, max_response_tokens]: one a row."""
        self.temperature = sampling.temperature
        self._stop_ids = np.array(sampling.stop_token_ids, dtype=np.int64)
        self._max_response = sampling.max_response_tokens
        self._uniforms = uniforms
        self._prompt_lengths = np.array([len(prompt) for prompt in prompts])
        self.max_length = int(self._prompt_lengths.max()) + self._max_response
        self.tokens = np.zeros((len(prompts), self.max_length), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = prompt
        self._logprobs = np.zeros((len(prompts), self._max_response), dtype=np.float32)
        self._response_lengths = np.zeros(len(prompts), dtype=np.int64)
        self._finished = np.zeros(len(prompts), dtype=bool)
        self.done = np.zeros(len(prompts), dtype=bool)
        """[b]: finished or at the maximum length."""
        self.position = int(self._prompt_lengths.min())
        """Tokens of each sequence that are known: the next one goes here."""
        self._cached = np.arange(len(prompts))
        """Rows in the cache, in its order; some may be done."""

    def uniforms(self) -> NDArray[np.float64]:
        """float64: a random number for each cached row (any, for those that take no sampled token now)."""
        offsets = (self.position - self._prompt_lengths[self._cached]).clip(0, self._max_response - 1)
        return self._uniforms[self._cached, offsets]

    def append(self, ids: NDArray[np.int64], logprobs: NDArray[np.float32]) -> list[int]:
        """The next token of each cached row; it is dropped where the prompt goes on or the row is done. The rows that
        are done with it."""
        offsets = self.position - self._prompt_lengths[self._cached]
        takes = (offsets >= 0) & ~self.done[self._cached]
        rows, offsets, ids = self._cached[takes], offsets[takes], ids[takes]
        self.tokens[rows, self.position] = ids
        self._logprobs[rows, offsets] = logprobs[takes]
        self._response_lengths[rows] = offsets + 1
        self._finished[rows] = np.isin(ids, self._stop_ids)
        self.done[rows] = self._finished[rows] | (offsets + 1 == self._max_response)
        self.position += 1
        return rows[self.done[rows]].tolist()

    def response(self, row: int) -> list[int]:
        """Tokens of a row's response, as far as it has come."""
        start = self._prompt_lengths[row]
        return self.tokens[row, start : start + self._response_lengths[row]].tolist()

    def compact(self) -> NDArray[np.int64] | None:
        """Drop done rows if they are many: the cache entries to keep, or None to leave the cache as it is."""
        kept = np.flatnonzero(~self.done[self._cached])
        if len(kept) >= COMPACT_BELOW * len(self._cached):
            return None
        self._cached = self._cached[kept]
        return kept

    def last_tokens(self) -> NDArray[np.int64]:
        """int64 [cached rows, 1]: what the model has not seen yet."""
        return self.tokens[self._cached, self.position - 1, None]

    def responses(self, version: int) -> Responses:
        """One a row, sampled with weights of `version`."""
        columns = np.arange(self._max_response)
        real = columns < self._response_lengths[:, None]
        tokens = np.take_along_axis(self.tokens, self._prompt_lengths[:, None] + columns, axis=1)
        return Responses(
            lengths=torch.from_numpy(self._response_lengths).int(),
            finished=torch.from_numpy(self._finished).int(),
            tokens=torch.from_numpy(tokens[real]).int(),
            logprobs=torch.from_numpy(self._logprobs[real]),
            versions=torch.full((int(real.sum()),), version, dtype=torch.int32),
        )


def _in_row_order(parts: Sequence[Responses], order: Sequence[int]) -> Responses:
    """Batches' responses, whose i-th sequence is row order[i], as one with rows 0, 1, ..."""
    if not parts:
        empty = torch.empty(0, dtype=torch.int32)
        return Responses(empty, empty, empty, torch.empty(0, dtype=torch.float32), empty)
    merged = Responses.concatenate(parts)
    index = np.argsort(order)
    lengths = merged.lengths.tolist()
    flat = {name: getattr(merged, name).split(lengths) for name in ("tokens", "logprobs", "versions")}
    return Responses(
        lengths=merged.lengths[index],
        finished=merged.finished[index],
        **{name: torch.cat([pieces[i] for i in index]) for name, pieces in flat.items()},
    )
