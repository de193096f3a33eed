"""Memory of a push by the plan: two buckets, and vLLM's modules that have some of their slices and not all."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markdown_table import markdown_table
from reshard_cases import Case

from megatron_riskpo.resharding.pieces import module_numbers
from megatron_riskpo.resharding.plan import RankPlan, plan_rank, transfer_items

_NUM_RANKS = 5
"""Looked at in each case, spread over the rollout ranks."""


def report_memory(cases: Sequence[Case]) -> dict[str, Any]:
    """Of the rank with most."""
    rows, figures = [], {}
    for case in cases:
        first, count = case.rollout.first_rank, case.rollout.num_ranks
        ranks = np.unique(np.linspace(first, first + count - 1, _NUM_RANKS).astype(int)).tolist()
        plans = [plan_rank.__wrapped__(case.layout, rank) for rank in ranks]
        sizes = {
            "buckets": max(plan.bucket_bytes for plan in plans),
            "module": max(_largest_module(plan) for plan in plans),
            "open": max(plan.peak_open_bytes for plan in plans),
        }
        figures[case.name] = sizes
        rows.append([case.name, *(f"{size / 2**20:.0f}" for size in sizes.values()),
                     f"{sizes['open'] / sizes['module']:.2f}"])  # fmt: skip
    print("\n## Memory of a push\n")
    header = ["case", "two buckets MiB", "largest module MiB", "open at once MiB", "of the largest"]
    print(markdown_table(header, rows))
    return figures


def _largest_module(plan: RankPlan) -> int:
    """Bytes that it receives."""
    keys = module_numbers(plan.layout.model)[plan.receives["piece"]], plan.receives["layer"]
    _, index = np.unique(np.stack(keys), axis=1, return_inverse=True)
    return int(np.bincount(index.ravel(), transfer_items(plan.receives)).max()) * plan.layout.item_size
