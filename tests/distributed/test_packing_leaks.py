"""A changed sequence leaves the log-probs of its neighbours in the pack, and their gradients, as they were bit for bit.

Not so for a sequence of another length: other shapes of matrix products may round otherwise. Nor with experts, whose
products take as many rows as tokens come to them.
"""

import pytest
import torch

from tests.distributed.layout_cases import ragged_rollouts
from tests.distributed.leak_cases import CHANGED, LAYOUTS, NUM_SEQUENCES, run
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaks")
    make_tiny(folder / "model", "qwen3", tied=True, seed=3, hidden_size=64)
    return run_on_ranks(f"{run.__module__}:{run.__name__}", 2, folder / "ranks")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_do_not_notice(ranks, layout):
    rollouts, _, _ = ragged_rollouts(NUM_SEQUENCES)
    rows = torch.arange(NUM_SEQUENCES).repeat_interleave(rollouts.response_lengths)
    for of_rank in ranks:
        (before, gradients), (after, gradients_after) = of_rank[layout]
        assert torch.equal(before[rows != CHANGED], after[rows != CHANGED])
        assert not torch.equal(before[rows == CHANGED], after[rows == CHANGED])
        assert any(gradient.abs().max() > 0 for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert torch.equal(gradient, gradients_after[name]), name
