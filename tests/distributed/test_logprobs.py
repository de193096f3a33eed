"""Log-probs and entropy of a vocabulary over 2 and 4 gloo ranks: values and gradients equal to those of one process.

Second way to the number: one process, which tests/actor/test_logprobs.py holds against log_softmax.
"""

import pytest
import torch

from tests.distributed.logprob_cases import CASES, run
from tests.distributed.ranks import run_on_ranks


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logprobs")
    return {n: run_on_ranks(f"{run.__module__}:{run.__name__}", n, folder / str(n)) for n in (1, 2, 4)}


def relative_error(found, expected):
    return float((found - expected).double().norm() / expected.double().norm())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_equal_to_one_process(by_ranks, num_ranks, name):
    expected, ranks = by_ranks[1][0][name], [results[name] for results in by_ranks[num_ranks]]
    bound = 1e-6 if expected["values"].dtype == torch.float32 else 1e-13
    for result in ranks:
        assert torch.equal(result["values"], ranks[0]["values"])
        assert not result["padding"].any()
        assert result["num_collectives"] == 2
        for key in ("values", "hidden"):
            assert relative_error(result[key], expected[key]) < bound, key
    weight = torch.cat([result["weight"] for result in ranks])
    assert relative_error(weight, expected["weight"]) < bound
