"""The processes that convert together: one, or all ranks of torchrun, srun or `--ranks`."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from megatron_riskpo.distributed.launch import RankEnv, init_process_group
from megatron_riskpo.errors import RiskpoError, RunError, UsageError

T = TypeVar("T")

TIMEOUT_S = 3600
"""The longest that ranks wait for the slowest; one that dies is noticed at once by its broken connections."""


@dataclass(frozen=True)
class Team:
    """This process among them; without process groups where it is alone."""

    rank: int = 0
    size: int = 1
    speaks: bool = True
    """Tells an error of any rank: rank 0 does, or all under a launcher that says the same thing once."""

    def each(self, work: Callable[[], T]) -> T:
        """work() on every rank; if one fails by the user's fault or the system's, its error on all.

        Another rank's death is whatever torch.distributed makes of it.
        """
        if self.size == 1:
            return work()
        result, error, failure = None, None, None
        try:
            result = work()
        except (RiskpoError, OSError) as caught:
            said = str(caught) if self.rank == 0 else f"rank {self.rank}: {caught}"
            error, failure = caught, (said, isinstance(caught, UsageError))
        failures = [found for found in self._exchange(failure) if found is not None]
        if failures:
            said, is_usage = failures[0]
            if not self.speaks:
                raise SystemExit(UsageError.exit_code if is_usage else RunError.exit_code)
            raise (UsageError if is_usage else RunError)(said) from error
        return result  # type: ignore[return-value]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Every rank's work(), on every rank; errors as with `each`."""
        return self._exchange(self.each(work))

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0's work(), on every rank; errors as with `each`."""
        return self.gather(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _exchange(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]


@contextlib.contextmanager
def gathered(env: RankEnv | None) -> Iterator[Team]:
    """The team of this process's ranks, for the length of the body."""
    if env is None or env.world_size == 1:
        yield Team()
        return
    import torch.distributed as dist

    init_process_group(env, TIMEOUT_S, on_cpu=True)
    try:
        yield Team(env.rank, env.world_size, speaks=env.rank == 0 or env.self_launched)
    finally:
        dist.destroy_process_group()
