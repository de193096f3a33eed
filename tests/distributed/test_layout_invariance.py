"""The same rollouts give the same update under every layout, on real megatron-core over gloo.

Second way to each number: one process, one micro-batch. Log-probs also against transformers. Gradients are compared
whole, gathered to Hugging Face names, so this also tests the weight tables and the export over tensor-parallel and
pipeline ranks. Not tested here: context, expert and virtual pipeline parallelism, bfloat16.
"""

import pytest
import torch

from tests.distributed.layout_cases import LOSSES, TEMPERATURE, ragged_rollouts, run
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import hf_token_logprobs, load_hf, make_tiny_qwen2

RELATIVE = 1e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for tied in ("tied", "untied"):
        # 97 entries: tensor parallelism has to pad the vocabulary.
        make_tiny_qwen2(folder / tied, tied=tied == "tied", seed=3, vocab_size=97)
    target = f"{run.__module__}:{run.__name__}"
    (single,) = run_on_ranks(target, 1, folder / "one")
    return folder, single, run_on_ranks(target, 2, folder / "two")


CASES = [(tied, loss) for tied in ("tied", "untied") for loss in LOSSES]


def largest_difference(a: dict, b: dict) -> float:
    """Over all tensors, relative to the largest element anywhere (gradients of biases can be near 0)."""
    assert a.keys() == b.keys()
    scale = max(t.abs().max().item() for t in b.values())
    return max((a[n] - b[n]).abs().max().item() for n in b) / scale


@pytest.mark.parametrize("tied", ["tied", "untied"])
def test_logprobs_equal_transformers(results, tied):
    folder, single, _ = results
    rollouts, _, _ = ragged_rollouts()
    model = load_hf(folder / tied)
    expected = torch.cat(
        [
            hf_token_logprobs(model, s, TEMPERATURE)[p - 1 :]
            for s, p in zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(single["reference", tied, "riskpo"]["before"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tied", "loss"), CASES)
def test_update_does_not_depend_on_layout(results, tied, loss):
    _, single, ranks = results
    reference = single["reference", tied, loss]
    for rank, rank_results in enumerate([single, *ranks]):
        for (layout, t, name), outputs in rank_results.items():
            if (t, name) != (tied, loss) or layout == "reference":
                continue
            where = f"{layout} on rank {rank - 1 if rank else 0}"
            torch.testing.assert_close(outputs["before"], reference["before"], rtol=0, atol=5e-6, msg=where)
            assert outputs["metrics"] == pytest.approx(reference["metrics"], rel=RELATIVE, abs=2e-7), where
            if outputs["gradients"]:
                assert largest_difference(outputs["gradients"], reference["gradients"]) < RELATIVE, where
            assert largest_difference(outputs["weights"], reference["weights"]) < 2e-6, where


def test_update_moves_the_weights(results):
    _, single, _ = results
    outputs = single["reference", "tied", "riskpo"]
    assert outputs["metrics"]["actor/grad_norm"] > 1e-3
    assert any(t.abs().max() > 0 for t in outputs["gradients"].values())
