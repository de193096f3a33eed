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
WITH_EXPERTS = ("qwen3_moe", "mixtral")
TP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[int, list[dict[str, Any]]] = {2: [TP, {"pp": 2}], 4: [TP | {"pp": 2}]}
OF_FOUR_RANKS = ("qwen2", "qwen3_moe")


def run(folder: Path, num_ranks: int) -> list[dict]:
    """What each rank found, by case."""
    cases = []
    for family, tied in FAMILIES.items() if num_ranks == 2 else [(f, FAMILIES[f]) for f in OF_FOUR_RANKS]:
        make_tiny(folder / family, family, tied=tied, seed=0)
        # Experts are dealt out over the ranks of a stage: pp = 2 leaves one of two ranks.
        layouts = [
            layout | {"ep": 2} if family in WITH_EXPERTS and "tp" in layout else layout for layout in LAYOUTS[num_ranks]
        ]
        cases.append((family, layouts, [1, 2]))
    torch.save(cases, folder / "cases.pt")
    target = f"{in_process_cases.__name__}:{in_process_cases.outcomes.__name__}"
    return run_on_ranks(target, num_ranks, folder / "ranks", timeout_s=900)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_after_each_update_vllm_is_the_actor(tmp_path, num_ranks):
    ranks = run(tmp_path, num_ranks)
    num_models = len(FAMILIES) if num_ranks == 2 else len(OF_FOUR_RANKS)
    assert len(ranks[0]) == 2 * len(LAYOUTS[num_ranks]) * (num_models + len(in_process_cases.THROUGH_MEMORY))
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
