"""Reference weights take the policy's place and give it back bit for bit; on many ranks with a real actor in
tests/distributed/test_reference.py."""

import pytest
import torch

from megatron_riskpo.actor.reference import ReferenceWeights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swaps_in_the_same_memory_and_back(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    reference = ReferenceWeights(model)
    buffer = model[0].weight.detach()  # a view, as Megatron's buffers hold them
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(1)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with reference.in_place():
            assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())
            assert torch.equal(buffer, original["0.weight"])
        assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())


def test_an_error_inside_leaves_the_policy_as_it_was():
    model = torch.nn.Linear(2, 2)
    reference = ReferenceWeights(model)
    with torch.no_grad():
        model.weight.fill_(5.0)
    with pytest.raises(RuntimeError, match="inside"), reference.in_place():
        raise RuntimeError("inside")
    assert (model.weight == 5.0).all()
