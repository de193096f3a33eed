"""The rollouts of each step, and of the steps after it while the step trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from megatron_riskpo.data.mixture import MixedStream
from megatron_riskpo.data.stream import PromptStream, sample_seeds
from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.types import OnFinished, RolloutEngine, Rollouts, SamplingConfig


class PrefetchingEngine(Protocol):
    """An engine that samples while the ranks do something else."""

    def submit(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int],
        begun: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """Begin, or go on from what `under_way` had; returns at once."""
        ...

    def under_way(self, pending: Any) -> dict[str, Any]:
        """What has come of this rank's part of a `submit`, as a weights_only load reads it."""
        ...

    def collect(self, pending: Any, on_finished: OnFinished | None = None) -> Rollouts:
        """The rollouts of a `submit`; `on_finished` as RolloutEngine's. Collective."""
        ...


@dataclass
class _Ahead:
    """A step whose questions are drawn."""

    rows: list[int]
    pending: Any = None
    """What `submit` gave; None where nothing is under way (after a resume)."""
    begun: Mapping[str, Any] | None = None
    """What a checkpoint had of it."""


class RolloutSource:
    """Draws questions and has them answered; the same calls on every rank.

    With max_staleness = k the first draws of the next k steps are sampled while a step trains, with weights that are
    then at most k RL steps (of actor.mini_batches optimizer steps each) old. Of what is under way at a checkpoint,
    questions and tokens so far are saved: after a resume the answers go on from there, no question is lost and none
    comes twice.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        stream: PromptStream | MixedStream,
        prompts: Sequence[list[int]],
        sampling: SamplingConfig,
        seed: int,
        *,
        max_staleness: int = 0,
        num_steps: int = 0,
    ) -> None:
        """`prompts`: of all questions, by index. `num_steps`: the last step, beyond which nothing is begun."""
        self._engine, self._stream, self._prompts = engine, stream, prompts
        self.sampling, self._seed = sampling, seed
        self._max_staleness, self._num_steps = max_staleness, num_steps
        self._ahead: dict[int, _Ahead] = {}

    def draw(
        self, step: int, draw: int, on_finished: Callable[[int, int, Sequence[int]], None] = lambda *told: None
    ) -> tuple[list[int], Rollouts]:
        """Question indices and rollouts of the step's draw (from 0). `on_finished` is told of each response, on one
        rank, before this returns: its row in the rollouts, its question's index, its tokens. Raises RunError where a
        token was sampled with weights that are older than allowed."""
        ahead = self._ahead.pop(step, None) if draw == 0 else None
        rows = ahead.rows if ahead is not None else self._stream.next_batch()

        def tell(row: int, tokens: Sequence[int]) -> None:
            on_finished(row, rows[row // self.sampling.group_size], tokens)

        if ahead is not None and ahead.begun is not None:
            self._begin(step, ahead)
        if ahead is not None and ahead.pending is not None:
            rollouts = cast(PrefetchingEngine, self._engine).collect(ahead.pending, tell)
        else:
            rollouts = self._engine.generate(*self._request(step, rows, draw), tell)
        self._check_staleness(step, rollouts)
        return rows, rollouts

    def prefetch(self, step: int) -> None:
        """Begin the next max_staleness steps; called when the data of `step` is complete."""
        for later in range(step + 1, min(step + self._max_staleness, self._num_steps) + 1):
            ahead = self._ahead.setdefault(later, _Ahead([]))
            ahead.rows = ahead.rows or self._stream.next_batch()
            if ahead.pending is None:
                self._begin(later, ahead)

    def _begin(self, step: int, ahead: _Ahead) -> None:
        engine = cast(PrefetchingEngine, self._engine)
        ahead.pending, ahead.begun = engine.submit(*self._request(step, ahead.rows, 0), ahead.begun), None

    def _request(self, step: int, rows: list[int], draw: int) -> tuple[list[list[int]], SamplingConfig, list[int]]:
        seeds = sample_seeds(self._seed, step, len(rows), "train", draw)
        return [self._prompts[row] for row in rows], self.sampling, seeds

    def _check_staleness(self, step: int, rollouts: Rollouts) -> None:
        staleness = token_staleness(step, rollouts)
        wrong = staleness[(staleness < 0) | (staleness > self._max_staleness)]
        if wrong.numel():
            versions = ", ".join(map(str, (step - 1 - wrong).unique().tolist()))
            raise RunError(
                f"step {step}: a response was sampled with weights of version {versions}, the "
                f"step needs {step - 1 - self._max_staleness} to {step - 1} (rollout.max_staleness = "
                f"{self._max_staleness}); an engine has the wrong weights, go on from the last checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the stream's state, and the questions of the steps that were begun."""
        return {**self._stream.state_dict(), "ahead": {str(step): ahead.rows for step, ahead in self._ahead.items()}}

    def under_way(self) -> dict[str, Any]:
        """By step, what has come of this rank's part of the rollouts that were begun."""
        engine = cast(PrefetchingEngine, self._engine)
        found = {
            str(step): ahead.begun if ahead.pending is None else engine.under_way(ahead.pending)
            for step, ahead in self._ahead.items()
        }
        return {step: begun for step, begun in found.items() if begun is not None}

    def load_state_dict(self, state: dict[str, Any], under_way: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; `under_way`: what this rank had then, or nothing. Raises UsageError as
        PromptStream does."""
        self._stream.load_state_dict(state)
        self._ahead = {
            int(step): _Ahead(rows, begun=under_way.get(step)) for step, rows in state.get("ahead", {}).items()
        }


def token_staleness(step: int, rollouts: Rollouts) -> torch.Tensor:
    """int32 [num_response_tokens]: RL steps (of actor.mini_batches optimizer steps each) that the weights of each token
    are behind those of the step's beginning; empty where the engine does not know."""
    versions = rollouts.weight_versions
    return torch.empty(0, dtype=torch.int32) if versions is None else step - 1 - versions


def staleness_metrics(step: int, rollouts: Rollouts) -> dict[str, float]:
    """rollout/staleness_mean and _max, of tokens, in RL steps; rollout/mixed_versions: share of the responses that were
    begun with one version and went on with another."""
    staleness = token_staleness(step, rollouts)
    if not staleness.numel():
        return {}
    mixed = [int(part.min()) < int(part.max()) for part in rollouts.split_by_response(staleness) if part.numel()]
    return {
        "rollout/staleness_mean": float(staleness.double().mean()),
        "rollout/staleness_max": float(staleness.max()),
        "rollout/mixed_versions": sum(mixed) / max(len(mixed), 1),
    }
