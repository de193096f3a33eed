"""A golden comparison that fails leaves vLLM unusable, as a push that fails does (the probe: test_bridge)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.in_process import InProcessPush
from megatron_riskpo.resharding.layout_check import Placement
from tests.rollout.test_sleep import SAMPLING, engine


def push_of(vllm: Any, pushed: torch.Tensor) -> InProcessPush:
    """One rank's push of the tensor "w"; the actor has ones."""
    model = nn.Module()
    model.weight = nn.Parameter(pushed)
    made: Any = InProcessPush.__new__(InProcessPush)
    made.sink = SimpleNamespace(keep=None, begin=lambda: None, finish=lambda version: None, model=model)
    made.push = SimpleNamespace(run=lambda sink, version: sink.keep("weight", pushed))
    made._control = SimpleNamespace(
        agree=lambda number, what: None, gather=lambda number, what: [number], guarded=lambda items, phase: items
    )  # fmt: skip
    made._actor = SimpleNamespace(export_weights=lambda: [("w", torch.ones(2, 3))])
    made._traced = {"w": [Placement(((0, 2), (0, 3)), "weight", ((0, 2), (0, 3)))]}
    made._engine, made._peers = vllm, None
    return made


def test_golden_mode_ends_an_engine_with_other_numbers(monkeypatch):
    vllm = engine([], monkeypatch, may_sleep=False)
    vars(vllm)["pushed"] = 1
    assert push_of(vllm, torch.ones(2, 3)).run_golden(1) == 6
    assert vllm.weight_version == 1
    vars(vllm)["pushed"] = 2
    with pytest.raises(RunError, match=r"after sync 2 vLLM holds other numbers .* on this one w"):
        push_of(vllm, torch.zeros(2, 3)).run_golden(2)
    assert vllm.weight_version == 1
    for call in (lambda: vllm.generate([[5]], SAMPLING, [0]), lambda: push_of(vllm, torch.ones(2, 3)).run_golden(3)):
        with pytest.raises(RunError, match=r"half-updated \(push of version 2"):
            call()


def test_an_engine_whose_weights_are_refused_says_so(monkeypatch):
    vllm = engine([], monkeypatch, may_sleep=False)
    push_of(vllm, torch.ones(2, 3)).give_up(4)
    with pytest.raises(RunError, match=r"holds wrong weights \(push of version 4\); restart"):
        vllm.generate([[5]], SAMPLING, [0])
