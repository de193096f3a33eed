"""When modules are made, packed and missed, on a stand-in for the model (vLLM itself: test_in_process)."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding import shard_sink
from megatron_riskpo.resharding.shard_sink import VllmShardSink

EXPECTED = {"table.weight": 5 * 4, "linear.weight": 12, "linear.bias": 3}
"""The table has 8 rows, 3 of which pad the vocabulary."""


def materialize(module: nn.Module) -> None:
    for name, tensor in list(module.named_parameters(recurse=False)):
        if tensor.is_meta:
            setattr(module, name, nn.Parameter(torch.full(tensor.shape, 7.0), requires_grad=False))


@pytest.fixture
def sink(monkeypatch):
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "linear": nn.Linear(4, 3)})
    calls: list[str] = []

    def begin():
        calls.append("begin")
        for module in model.values():
            module.weight = nn.Parameter(torch.empty(module.weight.shape, device="meta"))

    monkeypatch.setattr(shard_sink, "_materialize", materialize)
    monkeypatch.setattr(shard_sink, "_pack", lambda module, config: calls.append(type(module).__name__))
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(get_model=lambda: model),
        vllm_config=None,
        riskpo_begin_update=begin,
        riskpo_finish_update=lambda version: calls.append(f"finish {version}"),
    )
    made = VllmShardSink(worker, EXPECTED)
    made.calls = calls  # type: ignore[attr-defined]
    made.begin()
    return made


def bring(sink: VllmShardSink, name: str, numel: int) -> None:
    sink.parameter(name).view(-1)[:numel] = 1
    sink.arrived(name, numel)


def test_modules_are_packed_when_they_are_complete(sink):
    kept = {}
    sink.keep = lambda name, tensor: kept.update({name: tensor.clone()})
    bring(sink, "linear.bias", 3)
    assert sink.calls == ["begin"]
    bring(sink, "linear.weight", 12)
    assert sink.open_modules.peak_bytes == 4 * 12  # the bias stays where it is, as in vLLM
    bring(sink, "table.weight", 12)
    assert sink.calls == ["begin", "Linear"]
    sink.arrived("table.weight", 8)
    sink.finish(4)
    assert sink.open_modules.peak_bytes == 4 * 8 * 4
    assert sink.calls == ["begin", "Linear", "Embedding", "finish 4"]
    assert set(kept) == set(EXPECTED)
    assert torch.equal(kept["table.weight"][5:], torch.zeros(3, 4))  # rows that pad
    assert torch.equal(kept["linear.weight"], torch.ones(3, 4))


def test_what_is_missing_or_too_much_is_an_error(sink):
    bring(sink, "table.weight", 20)
    with pytest.raises(RunError, match=r"version 4: 1 of 2 modules are not complete, the first is linear"):
        sink.finish(4)
    assert "finish 4" not in sink.calls
    with pytest.raises(RunError, match="more numbers came for linear"):
        bring(sink, "linear.weight", 16)


def test_a_module_that_comes_between_is_an_error(sink):
    bring(sink, "table.weight", 12)
    sink.open_modules.check()
    bring(sink, "linear.weight", 12)
    assert sink.open_modules.peak_bytes == 128 + 48
    with pytest.raises(RunError, match=r"module linear \(48 bytes\) came before table \(128 bytes\) was complete"):
        sink.open_modules.check()
    sink.begin()
    bring(sink, "linear.weight", 12)
    sink.open_modules.check()


def test_a_rank_with_padding_alone_is_packed_all_the_same(sink):
    sink._expected = {"table.weight": 0}
    sink.begin()
    sink.finish(0)
    assert sink.calls == ["begin", "begin", "Embedding", "finish 0"]
