"""The same rollouts give the same three updates under every layout, on real megatron-core over gloo.

Second way to each number: one process, one micro-batch. Log-probs also against transformers. Gradients are compared
whole, gathered to Hugging Face names, so this also tests the weight tables and the export over tensor-, pipeline- and
expert-parallel ranks. Not tested here: bfloat16 (test_hf_parity), TransformerEngine and NCCL (tools/gpu).
"""

import pytest
import torch

from tests.distributed.compare import largest_difference, relative_error
from tests.distributed.layout_cases import LAYOUTS, MODELS, TEMPERATURE, applies, make_models, ragged_rollouts, run
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import hf_token_logprobs, load_hf

RELATIVE = 1e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    make_models(folder)
    target = f"{run.__module__}:{run.__name__}"
    return folder, {n: run_on_ranks(target, n, folder / f"on_{n}", timeout_s=600) for n in LAYOUTS}


CASES = [
    (num_ranks, layout, model)
    for num_ranks, layouts in LAYOUTS.items()
    for layout, config in layouts.items()
    for model in MODELS
    if applies(config, model)
]


@pytest.mark.parametrize("model", MODELS)
def test_logprobs_equal_transformers(results, model):
    folder, by_ranks = results
    rollouts, _, _ = ragged_rollouts()
    hf = load_hf(folder / model)
    expected = torch.cat(
        [
            hf_token_logprobs(hf, s, TEMPERATURE)[p - 1 :]
            for s, p in zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(by_ranks[1][0]["reference", model]["before"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_ranks", "layout", "model"), CASES)
def test_updates_do_not_depend_on_layout(results, num_ranks, layout, model):
    _, by_ranks = results
    kind = "reference of 2 mini-batches" if "2 mini-batches" in layout else "reference"
    reference = by_ranks[1][0][kind, model]
    for outputs in (of_rank[layout, model] for of_rank in by_ranks[num_ranks]):
        torch.testing.assert_close(outputs["before"], reference["before"], rtol=0, atol=5e-6)
        for (metrics, logprobs, gradients), expected in zip(outputs["steps"], reference["steps"], strict=True):
            assert metrics == pytest.approx(expected[0], rel=RELATIVE, abs=2e-7)
            torch.testing.assert_close(logprobs, expected[1], rtol=0, atol=1e-5)
            assert relative_error(gradients, expected[2]) < 5 * RELATIVE
            assert largest_difference(gradients, expected[2]) < 1e-5
        assert relative_error(outputs["weights"], reference["weights"]) < RELATIVE


@pytest.mark.parametrize("model", MODELS)
def test_updates_move_the_weights(results, model):
    steps = results[1][1][0]["reference", model]["steps"]
    assert all(metrics["actor/grad_norm"] > 1e-3 for metrics, _, _ in steps)
    assert all(t.abs().max() > 0 for name, t in steps[0][2].items() if "k_proj.bias" not in name)
