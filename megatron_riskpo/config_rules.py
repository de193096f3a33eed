"""What a rule across options is, and how it names the settings that would work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setup:
    """What the rules look at."""

    config: Any
    """TrainConfig or SftConfig."""
    world_size: int
    """Ranks of the run."""
    model: Mapping[str, Any]
    """The model's Hugging Face config.json."""

    @property
    def data_parallel(self) -> int:
        """Where the ranks do not even suffice for one replica, 1: another rule says so."""
        actor = self.config.actor
        return max(1, self.world_size // (actor.tp * actor.cp * actor.pp))


Rule = Callable[[Setup], str | None]
"""What is wrong, with the numbers and the nearest setting that works, or None."""


def undivided(option: str, tp: int, sizes: Mapping[str, int]) -> str | None:
    """What to say of the first of the model's sizes that tp does not divide, with the nearest tp that divides all."""
    for what, size in sizes.items():
        if size % tp:
            valid = common_divisors(*sizes.values())
            return f"{option} = {tp} does not divide the model's {size} {what}; use {nearest(valid, tp)}"
    return None


def no_divisor(option: str, value: int, total: int, what: str) -> str:
    valid = common_divisors(total)
    return f"{option} = {value} does not divide the {total} {what}; use {nearest(valid, value)}"


def common_divisors(*sizes: int) -> list[int]:
    """Of all sizes, ascending."""
    return [n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)]


def nearest(valid: list[int], value: int) -> str:
    """The valid numbers next to `value`: "2 or 4"."""
    below, above = [n for n in valid if n < value], [n for n in valid if n > value]
    return " or ".join(str(n) for n in [*below[-1:], *above[:1]])


def multiples(unit: int, value: int) -> str:
    """The multiples of `unit` next to `value`, which is none: "3 or 6"."""
    below = value // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n)
