"""Checks of single options; each raises a UsageError of one line."""

import difflib
import functools
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_riskpo.errors import UsageError

_type_hints = functools.cache(get_type_hints)


def check_name(option: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise UsageError, naming the nearest right name, unless `value` is one of `allowed`."""
    names = sorted(allowed)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
    raise UsageError(f"{option} = {value} is unknown: {remedy}")


def check_literals(section: str, config: Any) -> None:
    """Raise UsageError unless every Literal field of a dataclass holds one of its values."""
    for name, hint in _type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            check_name(f"{section}.{name}", getattr(config, name), get_args(hint))


def check_range(option: str, value: float, low: float, high: float) -> None:
    """Raise UsageError unless `value` is a finite number with low <= value <= high."""
    if not isinstance(value, Real):
        raise UsageError(f"{option} = {value!r} must be a number")
    if not (math.isfinite(value) and low <= value <= high):
        limits = f"between {low} and {high}" if math.isfinite(high) else f"{low} or more"
        raise UsageError(f"{option} = {value} is out of range: it must be {limits}")


def check_whole(option: str, value: float) -> None:
    """Raise UsageError unless `value` is a whole number, by type: 2.0 is none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UsageError(f"{option} = {value!r} must be a whole number")
