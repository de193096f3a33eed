"""What a rank tells its guard."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GuardSettings:
    """As JSON the guard's only argument."""

    run_dir: str
    rank: int
    local_rank: int
    world_size: int
    pid: int
    """Of the rank, the guard's parent."""
    limit_s: float
    timeout_s: float
    position_fd: int
    stacks_fd: int
