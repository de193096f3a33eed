"""Reference weights take the policy's place and give it back bit for bit; on many ranks with a real actor in
tests/distributed/test_reference.py."""

import weakref

import pytest
import torch

from megatron_riskpo.actor.reference import ReferenceWeights, reference_weights
from megatron_riskpo.algorithms.config import PolicyLossConfig


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


def test_no_copy_is_made_without_a_kl_penalty(monkeypatch):
    copies = []
    monkeypatch.setattr("megatron_riskpo.actor.reference._host_copy", copies.append)
    model = torch.nn.Linear(2, 2)
    assert reference_weights(model, PolicyLossConfig(kl_coefficient=0.0)) is None
    assert copies == []
    assert isinstance(reference_weights(model, PolicyLossConfig(kl_coefficient=0.1)), ReferenceWeights)
    assert len(copies) == 2


def test_a_swap_holds_one_parameter_twice_and_no_more(monkeypatch):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    reference, plain = ReferenceWeights(model), torch.Tensor.clone
    clones: list[weakref.ref[torch.Tensor]] = []
    num_alive = []

    def clone(self: torch.Tensor) -> torch.Tensor:
        made = plain(self)
        clones.append(weakref.ref(made))
        num_alive.append(sum(seen() is not None for seen in clones))
        return made

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    with reference.in_place():
        pass
    # There and back again, six parameters each way.
    assert num_alive == [1] * 12
