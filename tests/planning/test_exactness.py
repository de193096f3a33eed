"""Predicted bytes against those that real runs allocate: the state to the byte, activations within 10 %.

The prediction builds a rank without memory and without its peers. The second way are real ranks over gloo, real
updates, and torch's profiler, which counts what the allocator hands out.
"""

import pytest
import torch

from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.planning.activations import rank_activations
from megatron_riskpo.planning.state_bytes import rank_state
from tests.distributed.ranks import run_on_ranks
from tests.planning.cases import CASES, LENGTHS, NUM_MICRO_BATCHES, make_models

EVERY = [(num_ranks, name) for num_ranks, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str], dict[str, float]]:
    """By number of ranks, rank and case."""
    folder = tmp_path_factory.mktemp("exactness")
    make_models(folder)
    results = {}
    for num_ranks in CASES:
        per_rank = run_on_ranks("tests.planning.cases:run", num_ranks, folder / str(num_ranks))
        for rank, by_case in enumerate(per_rank):
            results |= {(num_ranks, rank, name): found for name, found in by_case.items()}
    for name in ("dense", "tied", "moe"):
        results[0, 0, name] = load_model_config(folder / name)
    return results


@pytest.mark.parametrize(("num_ranks", "name"), EVERY)
def test_state_to_the_byte(num_ranks: int, name: str, measured) -> None:
    model, dtype, layout = CASES[num_ranks][name]
    for rank in range(num_ranks):
        state = rank_state(measured[0, 0, model], layout, getattr(torch, dtype), rank, num_ranks)
        found = measured[num_ranks, rank, name]
        assert (state.parameters, state.gradients) == (found["parameters"], found["gradients"])
        assert (state.main_weights, state.moments) == (found["main_weights"], found["moments"])
        assert state.parameters
        assert state.gradients
        assert state.moments


@pytest.mark.parametrize(("num_ranks", "name"), EVERY)
def test_activations_within_a_tenth(num_ranks: int, name: str, measured) -> None:
    model, dtype, layout = CASES[num_ranks][name]
    for rank in range(num_ranks):
        predicted = rank_activations(
            measured[0, 0, model], layout, getattr(torch, dtype), rank, num_ranks, LENGTHS, NUM_MICRO_BATCHES,
            on_gpu=False,
        )  # fmt: skip
        peak = measured[num_ranks, rank, name]["peak"]
        said = f"rank {rank}: {predicted.update} predicted, {peak} measured"
        assert 0.9 * peak < predicted.update < 1.1 * peak, said


def test_nothing_is_left_out_of_the_state(measured) -> None:
    """The dense model's parameters counted by hand: 16 bytes each in float32, no padding without sharding."""
    hidden, layers, vocab = 64, 4, 97
    layer = hidden * (2 * hidden + 2 * 32) + 2 * hidden + 3 * hidden * 2 * hidden + (hidden + 2 * 32)
    number = 2 * vocab * hidden + hidden + layers * layer
    found = measured[1, 0, "plain"]
    assert found["parameters"] == found["gradients"] == 4 * number
    assert (found["main_weights"], found["moments"]) == (0, 8 * number)
