"""Quantiles of scores that are spread over 1, 2 and 4 ranks: the same bits as one sort, and the bytes as stated.

Second way to the number: the sort of all scores in one process. Second way to the bytes: the tensors that were handed
to torch.distributed.
"""

import pytest
import torch

from megatron_riskpo.algorithms.distribution import Distribution
from megatron_riskpo.distributed.quantiles import MAX_GATHERED, communicated_bytes
from tests.distributed.advantage_cases import GROUP_SIZE, NUM_PROMPTS
from tests.distributed.quantile_cases import LEVELS, SCORES, run
from tests.distributed.ranks import run_on_ranks


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantiles")
    return {n: run_on_ranks(f"{run.__module__}:{run.__name__}", n, folder / str(n)) for n in (1, 2, 4)}


def bits(values: tuple[float, ...]) -> list[int]:
    return torch.tensor(values, dtype=torch.float64).view(torch.int64).tolist()


@pytest.mark.parametrize("name", SCORES)
def test_bit_equal_to_the_sort_on_any_number_of_ranks(by_ranks, name):
    distribution = Distribution.of_sample(SCORES[name] + 0.0)
    expected = bits(tuple(distribution.quantile(level) for level in LEVELS))
    for ranks in by_ranks.values():
        for result in ranks:
            found = {key: value[0] for key, value in result.items() if key.startswith(f"{name}/")}
            assert len(found) == 12
            for key, quantiles in found.items():
                assert bits(quantiles) == expected, key


def test_bytes_are_as_stated(by_ranks):
    for num_ranks, ranks in by_ranks.items():
        for result in ranks:
            for key in (f"{name}/{spread}" for name in SCORES for spread in ("even", "uneven", "last")):
                for form in ("gathered", "gathered, share known", "counted", "counted, share known"):
                    _, largest_share, calls = result[f"{key}/{form}"]
                    stated = communicated_bytes(
                        len(LEVELS), num_ranks, largest_share, share_is_known="known" in form,
                        max_gathered=0 if "counted" in form else MAX_GATHERED,
                    )  # fmt: skip
                    assert sum(num_bytes for _, num_bytes in calls) == stated, (key, form)


def test_few_scores_take_one_collective_and_scoring_another(by_ranks):
    for ranks in by_ranks.values():
        for result in ranks:
            assert result["normal/even/gathered, share known"][2] == [
                ("all_gather", 8 + 8 * result["normal/even/gathered"][1])
            ]
            assert [name for name, _ in result["normal/even/counted, share known"][2]] == ["all_reduce"] * 4
            # What a step of training sends for rewards and quantiles: every rank then knows all scores.
            assert result["scoring"] == [("all_reduce", 8 * NUM_PROMPTS * GROUP_SIZE)]


def test_radix_bytes_do_not_grow_with_the_scores():
    stated = {n: communicated_bytes(2, 8, n, share_is_known=True) for n in (2**17, 2**17 + 1, 2**30)}
    assert stated == {2**17: 8 * (2**17 + 1), 2**17 + 1: 7 * 2**19, 2**30: 7 * 2**19}


def test_errors_come_on_every_rank(by_ranks):
    for num_ranks, ranks in by_ranks.items():
        for result in ranks:
            for messages in result["errors"]:
                assert messages == ["there are no scores, so no quantiles", "1 scores are NaN: they have no quantiles"]
            assert result["too large"] == (
                f"a rank holds {num_ranks} scores, largest_share is {num_ranks - 1}: give the largest count"
            )
