import pytest
import torch

from megatron_riskpo.rollout.replicas import Responses, in_turns, join_prompts, slice_of


@pytest.mark.parametrize(("num_items", "num_parts"), [(0, 3), (2, 5), (7, 3), (12, 4)])
def test_slices_cover_everything_once_and_evenly(num_items, num_parts):
    slices = [slice_of(num_items, num_parts, part) for part in range(num_parts)]
    assert [i for part in slices for i in range(num_items)[part]] == list(range(num_items))
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) - min(sizes) <= 1


def test_packing_keeps_every_bit():
    responses = Responses(
        lengths=torch.tensor([2, 1, 0], dtype=torch.int32),
        finished=torch.tensor([1, 0, 0], dtype=torch.int32),
        tokens=torch.tensor([7, 1, 2**31 - 1], dtype=torch.int32),
        logprobs=torch.tensor([-1.1, -0.0, -float("inf")]),
        versions=torch.tensor([3, 4, -1], dtype=torch.int32),
    )
    back = Responses.unpack(responses.pack(), num_sequences=3)
    for name, value in vars(responses).items():
        assert torch.equal(getattr(back, name), value)


def test_each_response_follows_its_own_prompt():
    responses = Responses(
        lengths=torch.tensor([1, 2, 1, 1], dtype=torch.int32),
        finished=torch.tensor([1, 0, 0, 1], dtype=torch.int32),
        tokens=torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32),
        logprobs=torch.arange(5.0),
        versions=torch.tensor([0, 1, 2, 2, 3], dtype=torch.int32),
    )
    rollouts = join_prompts([[10], [20, 21]], group_size=2, responses=responses)
    assert [s.tolist() for s in rollouts.sequences()] == [[10, 1], [10, 2, 3], [20, 21, 4], [20, 21, 5]]
    assert rollouts.finished.tolist() == [True, False, False, True]
    assert rollouts.weight_versions.tolist() == [0, 1, 2, 2, 3]
    assert rollouts.select([3, 1]).weight_versions.tolist() == [3, 1, 2]


def test_ranks_of_a_replica_take_turns():
    told: list[tuple[int, int, list[int]]] = []
    for rank in range(3):
        tell = in_turns(lambda row, tokens, rank=rank: told.append((rank, row, list(tokens))), 10, rank, 3)
        for row in (2, 0, 1, 3):
            tell(row, [row])
    assert sorted(told) == [(0, 10, [0]), (0, 13, [3]), (1, 11, [1]), (2, 12, [2])]
    in_turns(None, 0, 0, 1)(0, [])
