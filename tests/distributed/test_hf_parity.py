"""Every model family, whole and over two tensor-parallel ranks: log-probs of transformers, and its tensors come out
bit for bit as they went in."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.layout_cases import TEMPERATURE, ragged_rollouts
from tests.distributed.parity_cases import DTYPES, LAYOUTS, run
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import FAMILIES, hf_token_logprobs, make_tiny

OPTIONS = {
    # Experts of other sizes, and probabilities that are not normalised over the chosen ones.
    "qwen3_moe": {"norm_topk_prob": False, "num_experts": 6, "num_experts_per_tok": 3},
    # A key-value head each, as in a model without grouped queries.
    "llama": {"num_kv_heads": 4},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    for seed, family in enumerate(FAMILIES):
        tied = family in ("qwen2", "qwen3")
        # Smaller weights than elsewhere: bfloat16's error grows with the logits.
        options = {"vocab_size": 97, "std": 0.05, **OPTIONS.get(family, {})}
        make_tiny(folder / family, family, tied=tied, seed=seed, **options)
    return folder, run_on_ranks(f"{run.__module__}:{run.__name__}", 2, folder / "ranks")


def transformers_logprobs(folder, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    rollouts, _, _ = ragged_rollouts()
    pieces = zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), strict=True)
    return torch.cat([hf_token_logprobs(model, s, TEMPERATURE)[p - 1 :] for s, p in pieces])


@pytest.mark.parametrize(("family", "layout"), [(family, layout) for family in FAMILIES for layout in LAYOUTS])
def test_logprobs_equal_transformers(results, family, layout):
    folder, ranks = results
    exact = transformers_logprobs(folder / family, torch.float32)
    rounded = transformers_logprobs(folder / family, torch.bfloat16)
    for of_rank in ranks:
        found, _ = of_rank[family, "float32", layout]
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
        found, _ = of_rank[family, "bfloat16", layout]
        assert (found - rounded).abs().mean() < 1e-2
        # Two ways of rounding differ by more, at a single token, than either does on average: neither is the truth.
        assert (found - exact).abs().mean() < 1.5 * (rounded - exact).abs().mean()


CASES = [(family, dtype, layout) for family in FAMILIES for dtype in DTYPES for layout in LAYOUTS]


@pytest.mark.parametrize(("family", "dtype", "layout"), CASES)
def test_weights_come_out_as_they_went_in(results, family, dtype, layout):
    folder, ranks = results
    expected = {
        name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(folder / family / "model.safetensors").items()
    }
    for of_rank in ranks:
        _, exported = of_rank[family, dtype, layout]
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
