"""Boxes of views, and what is said where vLLM's loaders disagree with the plan or golden mode finds other numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.golden import GoldenCopy
from megatron_riskpo.resharding.layout_check import Placement, box_of, compare, traced_placements


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_a_view_is_found_in_its_tensor(dims):
    whole = torch.empty([size for size, _, _ in dims], device="meta")
    box = tuple((start % size, min(size, start % size + length)) for size, start, length in dims)
    view = whole[tuple(slice(*ends) for ends in box)]
    assert box_of(view, whole.shape) == box


class Halves(nn.Module):
    """Loads the second half of the rows of `table`, and the whole of `scale`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 4, device="meta"))
        self.scale = nn.Parameter(torch.ones(4))
        self.weight.weight_loader = lambda param, loaded_weight: param.data.copy_(loaded_weight[3:])
        self.scale.weight_loader = lambda param, loaded_weight: param.data.copy_(loaded_weight)

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "table":
                self.weight.weight_loader(param=self.weight, loaded_weight=tensor)  # as vLLM's experts do
            else:
                self.scale.weight_loader(self.scale, tensor)


@pytest.fixture
def _meta_copies(monkeypatch):
    from megatron_riskpo.resharding import layout_check

    monkeypatch.setattr(layout_check, "_meta_like", lambda parameter: parameter.to("meta"))


@pytest.mark.usefixtures("_meta_copies")
def test_loaders_are_watched_and_left_as_they_were():
    model = Halves()
    loaders = model.weight.weight_loader, model.scale.weight_loader
    traced = traced_placements(model, [("table", (6, 4)), ("norm", (4,))])
    assert traced == {
        "table": [Placement(((3, 6), (0, 4)), "weight", ((0, 3), (0, 4)))],
        "norm": [Placement(((0, 4),), "scale", ((0, 4),))],
    }
    assert (model.weight.weight_loader, model.scale.weight_loader) == loaders
    assert torch.equal(model.scale, torch.ones(4))  # a parameter that is real stays as it is
    compare(traced, traced)
    wrong = traced | {"table": [Placement(((0, 3), (0, 4)), "weight", ((0, 3), (0, 4)))]}
    with pytest.raises(RunError, match=r"would put table at .*vLLM's own loader at"):
        compare(wrong, traced)


def test_golden_mode_finds_a_changed_bit():
    model = nn.Linear(4, 3, bias=False)
    places = {"w": [Placement(((1, 4), (0, 4)), "weight", ((0, 3), (0, 4)))]}
    whole = torch.randn(4, 4)
    model.weight.data.copy_(whole[1:])
    golden = GoldenCopy()
    golden.keep("weight", model.weight.data)
    golden.compare([("w", whole)], places, model)
    assert golden.num_compared == 12
    golden.refuse(3, [len(golden.differences), 0])
    # The live parameter alone: what vLLM holds is looked at, not only what was written.
    model.weight.data.view(torch.int32)[2, 1] ^= 1
    golden.compare([("w", whole)], places, model)
    assert golden.differences == ["w"]
    with pytest.raises(
        RunError, match=r"after sync 3 vLLM holds other numbers .* rank 0 found 1 tensors, on this one w"
    ):
        golden.refuse(3, [1, 0])
