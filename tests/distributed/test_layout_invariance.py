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
    ranks = [*run_on_ranks(target, 2, folder / "two"), *run_on_ranks(target, 4, folder / "four")]
    return folder, single, ranks


CASES = [(tied, loss) for tied in ("tied", "untied") for loss in LOSSES]


def relative_error(a: dict, b: dict) -> float:
    """|a - b| / |b| in the 2-norm, all tensors as one vector."""
    assert a.keys() == b.keys()
    difference = torch.stack([(a[n] - b[n]).double().norm() for n in b]).norm()
    return float(difference / torch.stack([t.double().norm() for t in b.values()]).norm())


def worst_tensor(a: dict, b: dict) -> float:
    """The same for each tensor alone, the worst of them. One that is a thousand times smaller than the largest is
    measured against that (the gradient of a key bias is 0 but for rounding: attention does not see it)."""
    floor = 1e-3 * max(t.norm().item() for t in b.values())
    return max((a[n] - b[n]).norm().item() / max(b[n].norm().item(), floor) for n in b)


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
    for rank_results in [single, *ranks]:
        for (layout, t, name), outputs in rank_results.items():
            if (t, name) != (tied, loss) or "reference" in layout:
                continue
            kind = "reference of 2 mini-batches" if "2 mini-batches" in layout else "reference"
            reference = single[kind, tied, loss]
            torch.testing.assert_close(outputs["before"], reference["before"], rtol=0, atol=5e-6, msg=layout)
            torch.testing.assert_close(outputs["logprobs"], reference["logprobs"], rtol=0, atol=1e-5, msg=layout)
            assert outputs["metrics"] == pytest.approx(reference["metrics"], rel=RELATIVE, abs=2e-7), layout
            if outputs["gradients"]:
                # The last mini-batch's: after an optimizer step the weights differ by rounding already.
                bound = 2 * RELATIVE if "2 mini-batches" in layout else RELATIVE
                assert relative_error(outputs["gradients"], reference["gradients"]) < bound, layout
                assert worst_tensor(outputs["gradients"], reference["gradients"]) < 1e-5, layout
            assert relative_error(outputs["weights"], reference["weights"]) < RELATIVE, layout


def test_update_moves_the_weights(results):
    _, single, _ = results
    outputs = single["reference", "tied", "riskpo"]
    assert outputs["metrics"]["actor/grad_norm"] > 1e-3
    assert any(t.abs().max() > 0 for t in outputs["gradients"].values())
