"""Questions of several sources, each step with a fixed share of each."""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor
from typing import Any

import numpy as np

from megatron_riskpo.data.sources import GYM_PREFIX, Question
from megatron_riskpo.data.stream import PromptStream
from megatron_riskpo.errors import UsageError


class MixedStream:
    """Question indices in batches, as PromptStream's, of sources with weights.

    Each source is a stream of its own: epoch after epoch, shuffled anew, no question twice before all others of its
    source. Of the sources that are not ahead of their share the one whose next question is due first comes next
    (earliest deadline first, Baruah et al., "Proportionate progress", 1996), so the first n questions, for any n, have
    n * share of each source, within 1 either way.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int, *, option: str
    ) -> None:
        """`sizes`: numbers of questions of the sources, whose indices follow one another. `option`: see PromptStream.

        Raises UsageError: more questions a step than there are, or a source without questions.
        """
        if min(sizes) < 1:
            raise UsageError(f"data.sources: a source has no training questions left ({list(sizes)}); take it out")
        if not 1 <= batch_size <= sum(sizes):
            raise UsageError(f"{option} = {batch_size}, but there are {sum(sizes)} training questions; lower it")
        # Fractions: a rounded share could leave a place in the order to none of the sources.
        self._shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        # Hashed: the streams of a run with the next seed are others.
        seeds = [int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) for index in range(len(sizes))]
        self._streams = [PromptStream(size, 1, own, option=option) for size, own in zip(sizes, seeds, strict=True)]
        self._counts = [0] * len(sizes)
        self._batch_size = batch_size

    def next_batch(self) -> list[int]:
        """batch_size question indices."""
        return [self._next() for _ in range(self._batch_size)]

    @property
    def epoch(self) -> float:
        """Epochs done of the source that is furthest, fractions included."""
        return max(stream.epoch for stream in self._streams)

    def _next(self) -> int:
        drawn = sum(self._counts)
        due = [
            (ceil((count + 1) / share), source)
            for source, (share, count) in enumerate(zip(self._shares, self._counts, strict=True))
            if floor(count / share) <= drawn
        ]
        _, source = min(due)
        self._counts[source] += 1
        return self._offsets[source] + self._streams[source].next_batch()[0]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the batch size may change before a resume."""
        return {"shares": self._shown_shares(), "sources": [stream.state_dict() for stream in self._streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UsageError if it comes from other sources, weights or another seed."""
        if state.get("shares") != self._shown_shares():
            raise UsageError(
                f"the checkpoint's data position is for other data (shares {state.get('shares')} -> "
                f"{self._shown_shares()}); restore data.sources, or start with run.resume never"
            )
        for stream, own in zip(self._streams, state["sources"], strict=True):
            stream.load_state_dict(own)
        self._counts = [int(own["position"]) for own in state["sources"]]

    def _shown_shares(self) -> list[float]:
        return [float(share) for share in self._shares]


def origin(question: Question) -> str:
    """The entry of data.sources, or data.train, that the question came from."""
    return question.source if question.source.startswith(GYM_PREFIX) else question.source.rpartition(":")[0]


def make_stream(
    questions: Sequence[Question], sources: dict[str, float], batch_size: int, seed: int, *, option: str
) -> PromptStream | MixedStream:
    """The stream over `questions`, which stand source by source where `sources` names several."""
    if not sources:
        return PromptStream(len(questions), batch_size, seed, option=option)
    origins = [origin(question) for question in questions]
    sizes = [origins.count(source) for source in sources]
    return MixedStream(sizes, list(sources.values()), batch_size, seed, option=option)
