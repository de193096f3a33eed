"""Actors under several layouts push into real vLLM engines in their processes, after each of five optimizer steps: over
gloo, and through shared memory.

Two ways to the same numbers: vLLM's log-probs against the actor's, and golden mode, which compares every number with
tensors gathered whole by the exporter. Every run of the tests takes each family on two ranks and on four; all
combinations take several minutes: pytest -m by_hand tests/resharding/test_in_process.py. Not tested here: a GPU, NCCL.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_on_ranks
from tests.resharding import in_process_cases
from tests.tiny_models import FAMILIES, make_tiny

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

TIED, UNTIED = True, False
WITH_EXPERTS = {"qwen3_moe": {"ep": 2}, "mixtral": {"etp": 2}}
TP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[int, list[dict[str, Any]]] = {2: [TP, {"pp": 2}], 4: [TP | {"pp": 2}]}
WHOLE_EXPERTS = {"tp": 2, "expert_parallel": True}
UNEVEN = "three_experts"
"""Of an odd width: they could not be split. vLLM's first rank has two, its second one."""

OVER_GLOO, BOTH_WAYS = [False], [False, True]
THROUGH_MEMORY = ("qwen3_moe", 4)
"""A family and a number of ranks that are pushed through shared memory, too: the rest is the same code. Two ranks and a
server: test_server_engine."""

Models = Mapping[tuple[str, bool], Sequence[int]]
"""By family and tiedness vLLM's tp."""
USUAL: dict[int, Models] = {
    2: {
        ("qwen2", TIED): (1, 2), ("qwen2", UNTIED): (1, 2), ("qwen3", TIED): (1, 2), ("llama", TIED): (1, 2),
        ("llama", UNTIED): (1, 2), ("mistral", UNTIED): (1, 2), ("qwen3_moe", UNTIED): (1, 2),
        ("mixtral", UNTIED): (1, 2),
    },
    4: {
        ("qwen2", TIED): (1, 2), ("qwen3", UNTIED): (1,), ("llama", TIED): (2,), ("mistral", UNTIED): (1,),
        ("qwen3_moe", UNTIED): (1, 2), ("mixtral", UNTIED): (2,),
    },
}  # fmt: skip
ALL: Models = {(family, tied): (1, 2) for family in FAMILIES for tied in (TIED, UNTIED)}

Case = tuple[str, list[dict[str, Any]], list[dict[str, Any]], list[bool]]
"""Model, actor layouts, options of vLLM, ways: whether through shared memory and not over gloo alone."""


def cases_of(folder: Path, num_ranks: int, models: Models) -> list[Case]:
    """With their models in `folder`."""
    cases: list[Case] = []
    for (family, tied), sizes in models.items():
        name = f"{family}-{'tied' if tied else 'untied'}"
        make_tiny(folder / name, family, tied=tied, seed=0)
        # Experts are dealt out, or split, over the ranks of a stage: pp = 2 leaves one of two ranks.
        layouts = [
            layout | WITH_EXPERTS[family] if family in WITH_EXPERTS and "tp" in layout else layout
            for layout in LAYOUTS[num_ranks]
        ]
        engines = [{"tp": tp} for tp in sizes] + [WHOLE_EXPERTS] * (family == "qwen3_moe")
        ways = BOTH_WAYS if (family, num_ranks) == THROUGH_MEMORY else OVER_GLOO
        cases.append((name, layouts, engines, ways))
    if num_ranks == 2:
        make_tiny(folder / UNEVEN, "qwen3_moe", tied=False, seed=0, num_experts=3, moe_intermediate_size=49)
        cases.append((UNEVEN, [TP], [WHOLE_EXPERTS], OVER_GLOO))
    return cases


def run(folder: Path, cases: list[Case], num_ranks: int) -> list[dict]:
    """What each rank found, by case."""
    torch.save(cases, folder / "cases.pt")
    target = f"{in_process_cases.__name__}:{in_process_cases.outcomes.__name__}"
    return run_on_ranks(target, num_ranks, folder / "ranks", timeout_s=900)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_after_each_update_vllm_is_the_actor(tmp_path, num_ranks):
    assert {family for family, _ in USUAL[num_ranks]} == FAMILIES.keys()
    assert_equal_after_each_update(tmp_path, num_ranks, USUAL[num_ranks])


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_combinations(tmp_path, num_ranks):
    """Prints a table (pytest -s)."""
    print(f"\n{num_ranks} ranks: largest difference of log-probs")
    for case, updates in assert_equal_after_each_update(tmp_path, num_ranks, ALL).items():
        print(*case, f"{max(update['difference'] for update in updates):.1e}", sep=" | ")


def assert_equal_after_each_update(folder: Path, num_ranks: int, models: Models) -> dict[Any, list[dict[str, float]]]:
    """What was compared, by case: the updates of all ranks."""
    cases = cases_of(folder, num_ranks, models)
    ranks = run(folder, cases, num_ranks)
    assert len(ranks[0]) == sum(len(layouts) * len(engines) * len(ways) for _, layouts, engines, ways in cases)
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
    return {case: [update for rank in ranks for update in rank[case]] for case in ranks[0]}
