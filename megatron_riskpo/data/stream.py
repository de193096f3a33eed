"""Which questions each step takes, and the seeds of its samples; both can be repeated and resumed exactly."""

from typing import Any, Literal

import numpy as np

from megatron_riskpo.errors import UsageError

# The first word of a generator's entropy keeps the uses of one run.seed apart: 0 the shuffle, then these.
SHUFFLE = 0
STREAMS = {"train": 1, "evaluation": 2, "bundles": 3}


class PromptStream:
    """Question indices in batches: epoch after epoch, each epoch a permutation that depends on (seed, epoch) only.
    A batch may run over the end of an epoch. `option`: the option that batch_size comes from, for its error."""

    def __init__(self, num_questions: int, batch_size: int, seed: int, *, option: str) -> None:
        if not 1 <= batch_size <= num_questions:
            raise UsageError(
                f"{option} = {batch_size}, but there are {num_questions} training questions; "
                "it must be between 1 and that number"
            )
        self._num_questions, self._batch_size, self._seed = num_questions, batch_size, seed
        self._position = 0

    def next_batch(self) -> list[int]:
        """batch_size question indices."""
        positions = range(self._position, self._position + self._batch_size)
        epochs = sorted({position // self._num_questions for position in positions})
        orders = {epoch: self._order(epoch) for epoch in epochs}
        self._position = positions.stop
        return [int(orders[p // self._num_questions][p % self._num_questions]) for p in positions]

    @property
    def epoch(self) -> float:
        """Epochs done, fractions included."""
        return self._position / self._num_questions

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([SHUFFLE, self._seed, epoch]).permutation(self._num_questions)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the batch size may change before a resume."""
        return {"position": self._position, "num_questions": self._num_questions, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UsageError if it comes from other questions or another seed."""
        here = {**self.state_dict(), "position": state["position"]}
        changed = [f"{key} {state[key]} -> {here[key]}" for key in here if here[key] != state[key]]
        if changed:
            raise UsageError(
                f"the checkpoint's data position is for other data ({', '.join(changed)}); "
                "restore data and run.seed, or start with run.resume never"
            )
        self._position = int(state["position"])


def sample_seeds(
    seed: int, step: int, num: int, stream: Literal["train", "evaluation", "bundles"], draw: int = 0
) -> list[int]:
    """`num` seeds for a step, 0 <= seed < 2**63; those of other steps, streams, runs and draws within a step are
    unrelated."""
    # A spawn key and not a fourth word: numpy pads the entropy with zeros.
    spawn_key = (draw,) if draw else ()
    words = np.random.SeedSequence([STREAMS[stream], seed, step], spawn_key=spawn_key).generate_state(num, np.uint64)
    return [int(value) >> 1 for value in words]
