"""What every rollout engine takes and gives back: ragged token ids, no padding.

N = number of sequences = num_prompts * group_size; the group of prompt p is rows p*G .. p*G+G-1.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import torch
from torch import Tensor

OnFinished = Callable[[int, Sequence[int]], None]
"""Told of a finished response: its row among the batch's N, and its tokens, the stop token included."""


@dataclass(frozen=True)
class SamplingConfig:
    """How one `generate` call samples."""

    group_size: int
    """Responses a prompt."""
    max_response_tokens: int
    """A response is cut after so many tokens."""
    temperature: float
    """Softmax temperature; 0 is greedy."""
    stop_token_ids: tuple[int, ...]
    """A response ends with (and contains) the first of these."""


@dataclass(frozen=True)
class Rollouts:
    """Responses of a batch of prompts; flat and ragged, on the CPU."""

    tokens: Tensor
    """int64 [num_tokens]: prompt and response of sequence 0, then of sequence 1, ..."""
    prompt_lengths: Tensor
    """int64 [N], in tokens."""
    response_lengths: Tensor
    """int64 [N], in tokens, the stop token included."""
    rollout_logprobs: Tensor
    """float32 [num_response_tokens]: log-prob of each response token under the sampling distribution
    (temperature applied)."""
    finished: Tensor
    """bool [N]: ended with a stop token (False: cut at the maximum length)."""
    weight_versions: Tensor | None = None
    """int32 [num_response_tokens]: version of the weights that each token was sampled with; None: not sampled."""

    @property
    def num_sequences(self) -> int:
        return self.prompt_lengths.numel()

    @property
    def lengths(self) -> Tensor:
        """int64 [N]: prompt + response, in tokens."""
        return self.prompt_lengths + self.response_lengths

    def sequences(self) -> list[Tensor]:
        """N tensors of prompt + response tokens (views)."""
        return list(self.tokens.split(self.lengths.tolist()))

    def responses(self) -> list[Tensor]:
        """N tensors of response tokens, the stop token included (views)."""
        return [s[p:] for s, p in zip(self.sequences(), self.prompt_lengths.tolist(), strict=True)]

    def split_by_response(self, values: Tensor) -> list[Tensor]:
        """Cut a flat [num_response_tokens] tensor into N pieces (views)."""
        return list(values.split(self.response_lengths.tolist()))

    def select(self, rows: Sequence[int]) -> "Rollouts":
        """The given sequences, in the given order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        versions = self.weight_versions
        return Rollouts(
            tokens=_pick(self.sequences(), rows, self.tokens),
            prompt_lengths=self.prompt_lengths[index],
            response_lengths=self.response_lengths[index],
            rollout_logprobs=_pick(self.split_by_response(self.rollout_logprobs), rows, self.rollout_logprobs),
            finished=self.finished[index],
            weight_versions=None if versions is None else _pick(self.split_by_response(versions), rows, versions),
        )

    @classmethod
    def concat(cls, parts: "Sequence[Rollouts]") -> "Rollouts":
        """All sequences of the parts, in order; at least one part. Versions that one part lacks are left out."""
        columns = {item.name: [getattr(part, item.name) for part in parts] for item in fields(cls)}
        known = {name: column for name, column in columns.items() if all(part is not None for part in column)}
        return cls(**{name: torch.cat(column) for name, column in known.items()})


def _pick(pieces: Sequence[Tensor], rows: Sequence[int], whole: Tensor) -> Tensor:
    return torch.cat([pieces[i] for i in rows]) if len(rows) else whole[:0]


class SamplingEngine(Protocol):
    """A sampler that runs SPMD: every rank makes the same calls with the same arguments and gets the same, whole
    result, however the engine spreads the work."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int],
        on_finished: OnFinished | None = None,
    ) -> Rollouts:  # fmt: skip
        """group_size responses to each prompt (token ids), in order. `seeds` (one a prompt, 0 <= seed < 2**63)
        fix the samples: the same weights, prompts and seeds give the same responses.

        `on_finished` is called for each response on exactly one rank, in any order, while others are still sampled
        where the engine can, and at the latest before this returns."""
        ...

    def close(self) -> None:
        """Free what the engine holds; the process groups stay usable."""
        ...


class RolloutEngine(SamplingEngine, Protocol):
    """One in the training processes, which gets new weights after every step."""

    shares_weights: ClassVar[bool]
    """Samples from the actor's own parameters: nothing has to be brought to it."""

    @property
    def weight_version(self) -> int:
        """The version of the last complete update; -1 before the first."""
        ...

    def release(self) -> None:
        """No `generate` comes before new weights: memory that the trainer can use may go back."""
        ...


class WholeWeightsEngine(RolloutEngine, Protocol):
    """An engine that takes whole tensors (vLLM in the training processes takes slices: resharding/in_process.py)."""

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, float]:
        """Take new weights: (Hugging Face name, full tensor) pairs, the same on every rank; one that shares the actor's
        reads none. `version` is what `weight_version` says afterwards; cached prefixes are dropped. Metrics of it."""
        ...


class ScoringEngine(RolloutEngine, Protocol):
    """An engine that holds weights of its own, and can therefore be asked what it makes of given tokens."""

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Teacher-forced at temperature 1: float32 [len(sequence) - 1] for each sequence, entry i that of token i + 1
        given the tokens before it."""
        ...
