"""The reference model of a KL penalty: what the policy was before training, under tensor, pipeline and data
parallelism, with a distributed optimizer and in bfloat16. Second way: a run that never looks at the reference."""

import pytest
import torch

from tests.distributed.ranks import run_on_ranks
from tests.distributed.reference_cases import LAYOUTS, run
from tests.tiny_models import make_tiny_qwen2


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    # Tied: the last pipeline stage has a copy of the embedding, which has to move as well.
    make_tiny_qwen2(folder / "model", tied=True, seed=3, hidden_size=64)
    return run_on_ranks(f"{run.__module__}:{run.__name__}", 4, folder / "four")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_is_the_start_and_the_policy_does_not_notice(by_rank, layout):
    for result in by_rank:
        looking, plain = result[layout]
        assert (looking["policy"][0] - looking["start"]).abs().mean() > 1e-2
        for seen in looking["reference"]:
            assert torch.equal(seen, looking["start"])
        for a, b in zip(looking["policy"], plain["policy"], strict=True):
            assert torch.equal(a, b)
        for name, tensor in plain["weights"].items():
            assert torch.equal(looking["weights"][name], tensor), name
