"""Actors under several layouts push into real vLLM engines in their processes, after each of five optimizer steps: over
gloo, and through shared memory.

Two ways to the same numbers: vLLM's log-probs against the actor's, and golden mode, which compares every number with
tensors gathered whole by the exporter. Not tested here: a GPU, NCCL.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_on_ranks
from tests.resharding import in_process_cases
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

FAMILIES = {"qwen2": True, "qwen3": True, "llama": False, "mistral": False, "qwen3_moe": False, "mixtral": False}
"""By family whether its embeddings are tied."""
WITH_EXPERTS = {"qwen3_moe": {"ep": 2}, "mixtral": {"etp": 2}}
TP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[int, list[dict[str, Any]]] = {2: [TP, {"pp": 2}], 4: [TP | {"pp": 2}]}
OF_FOUR_RANKS = ("qwen2", "qwen3_moe")
WHOLE_EXPERTS = {"tp": 2, "expert_parallel": True}
UNEVEN = "three_experts"
"""Of an odd width: they could not be split. vLLM's first rank has two, its second one."""

Case = tuple[str, list[dict[str, Any]], list[dict[str, Any]]]
"""Model, actor layouts, options of vLLM."""


def cases_of(folder: Path, num_ranks: int) -> list[Case]:
    """With their models in `folder`."""
    cases: list[Case] = []
    for family in FAMILIES if num_ranks == 2 else OF_FOUR_RANKS:
        make_tiny(folder / family, family, tied=FAMILIES[family], seed=0)
        # Experts are dealt out, or split, over the ranks of a stage: pp = 2 leaves one of two ranks.
        layouts = [
            layout | WITH_EXPERTS[family] if family in WITH_EXPERTS and "tp" in layout else layout
            for layout in LAYOUTS[num_ranks]
        ]
        cases.append((family, layouts, [{"tp": 1}, {"tp": 2}, *[WHOLE_EXPERTS] * (family == "qwen3_moe")]))
    if num_ranks == 2:
        make_tiny(folder / UNEVEN, "qwen3_moe", tied=False, seed=0, num_experts=3, moe_intermediate_size=49)
        cases.append((UNEVEN, [TP], [WHOLE_EXPERTS]))
    return cases


def run(folder: Path, cases: list[Case], num_ranks: int) -> list[dict]:
    """What each rank found, by case."""
    torch.save(cases, folder / "cases.pt")
    target = f"{in_process_cases.__name__}:{in_process_cases.outcomes.__name__}"
    return run_on_ranks(target, num_ranks, folder / "ranks", timeout_s=900)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_after_each_update_vllm_is_the_actor(tmp_path, num_ranks):
    cases = cases_of(tmp_path, num_ranks)
    ranks = run(tmp_path, cases, num_ranks)
    num_ways = {name: 1 + (name in in_process_cases.THROUGH_MEMORY[num_ranks]) for name, _, _ in cases}
    assert len(ranks[0]) == sum(num_ways[name] * len(layouts) * len(engines) for name, layouts, engines in cases)
    for case in ranks[0]:
        for rank in ranks:
            updates = rank[case]
            assert len(updates) == in_process_cases.NUM_UPDATES + 1
            # The policy has moved, so that weights of the update before would be seen.
            assert len({update["mean"] for update in updates}) == len(updates)
            for update in updates:
                assert update["difference"] <= 1e-5, case
                assert update["bridge/golden_numbers"] > 0
                assert update["peak"] <= update["limit"]
        assert max(rank[case][0]["rounds"] for rank in ranks) > 2, case
