"""Which checkpoints of a run are kept: the newest, every m-th step, and the best by a metric of the evaluation.

The metric of each stands in its manifest, so that a resumed run, and `riskpo checkpoint prune`, know the best as well.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_riskpo.checkpoint.manifest import Found, log_damage, remove_checkpoint, survey


@dataclass(frozen=True)
class Retention:
    """What is kept when a checkpoint is saved; the rest is deleted."""

    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of every n-th step are kept for ever, beside the newest (a multiple of checkpoint.every); 0: none."""
    keep_best: str = ""
    """The checkpoint with the highest value of this metric is kept, beside the newest: eval/heldout/pass@K, with K of
    evaluation.ks. Compared are checkpoints of steps that were evaluated; of equals the newest counts. Empty: none."""


def kept_steps(metrics: Mapping[int, Mapping[str, float]], retention: Retention) -> set[int]:
    """Those of the steps with a whole checkpoint, given with the metrics of each, whose checkpoint is kept."""
    newest = sorted(metrics)[-retention.keep :]
    regular = [step for step in metrics if retention.keep_every and step % retention.keep_every == 0]
    best = best_step(metrics, retention.keep_best)
    return {*newest, *regular, *([] if best is None else [best])}


def best_step(metrics: Mapping[int, Mapping[str, float]], name: str) -> int | None:
    """The step with the highest value of the metric, the newest of equals; None where no step has it."""
    values = {step: of_step[name] for step, of_step in metrics.items() if name in of_step}
    comparable = {step: value for step, value in values.items() if not math.isnan(value)}
    return max(comparable, key=lambda step: (comparable[step], step), default=None)


def outdated(found: Sequence[Found], retention: Retention) -> list[Path]:
    """The folders that need not be kept, in the order of `found`.

    Damaged ones do not count; they are outdated like others once enough newer ones are whole.
    """
    metrics = {one.step: one.manifest.metrics for one in found if one.manifest is not None}
    if len(metrics) < retention.keep:
        return []
    oldest_of_newest = sorted(metrics)[-retention.keep]
    kept = kept_steps(metrics, retention)
    return [one.path for one in found if one.step < oldest_of_newest and one.step not in kept]


def remove_old(folder: Path, step: int, retention: Retention) -> None:
    """After step_`step` was saved: delete what is outdated, and log what is damaged.

    Sizes are checked, checksums not: reading all kept files at every save would cost more than it is worth.
    Folders of later steps stay (they were found damaged, or the user went back on purpose).
    """
    found = [one for one in survey(folder) if one.step <= step]
    for one in found:
        if one.manifest is None:
            log_damage(one.path, one.damage)
    for path in outdated(found, retention):
        remove_checkpoint(path)
