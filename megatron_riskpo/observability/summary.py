"""A run in a few numbers: before, after, and where the time went."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

# Metrics of a step are noisy: before and after are means over so many first and last steps.
WINDOW = 5
STEP_METRICS = {
    "reward/mean": "training reward",
    "actor/entropy": "entropy (nats)",
    "rollout/response_length": "response length (tokens)",
}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Change:
    """One quantity before and after training; is_share: in [0, 1], shown in percent."""

    label: str
    before: float
    after: float
    is_share: bool

    def shown(self) -> tuple[str, str, str]:
        """before, after, difference as text."""
        difference = self.after - self.before
        if self.is_share:
            return f"{self.before:.1%}", f"{self.after:.1%}", f"{100 * difference:+.1f} points"
        return f"{self.before:.3g}", f"{self.after:.3g}", f"{difference:+.3g}"


def values_of(rows: Rows, key: str) -> list[float]:
    """The key's finite values, in step order."""
    return [row[key] for row in rows if row.get(key) is not None]


def evaluation_keys(rows: Rows) -> list[str]:
    """eval/<set>/pass@k, by set and then by k."""
    keys = {key for row in rows for key in row if re.fullmatch(r"eval/.+/pass@\d+", key)}
    return sorted(keys, key=lambda key: (key.rpartition("@")[0], int(key.rpartition("@")[2])))


def changes(rows: Rows) -> list[Change]:
    """First and last evaluation (left out where there was only one), then STEP_METRICS."""
    found = []
    for key in evaluation_keys(rows):
        values = values_of(rows, key)
        if len(values) > 1:
            name, _, measure = key.removeprefix("eval/").rpartition("/")
            found.append(Change(f"{measure} ({name})", values[0], values[-1], is_share=True))
    for key, label in STEP_METRICS.items():
        values = values_of(rows, key)
        if values:
            found.append(Change(label, fmean(values[:WINDOW]), fmean(values[-WINDOW:]), is_share=False))
    return found


def phase_seconds(rows: Rows) -> dict[str, float]:
    """Mean seconds a training step (step > 0) spent in each phase, longest first."""
    steps = [row for row in rows if row["step"] > 0]
    keys = {key for row in steps for key in row if key.startswith("time/")}
    means = {key: sum(values_of(steps, key)) / len(steps) for key in keys}
    names = sorted(means, key=lambda key: (-means[key], key))
    return {key.removeprefix("time/").removesuffix("_s"): means[key] for key in names}
