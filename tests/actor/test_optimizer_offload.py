"""An offloaded optimizer holds no memory but during its step, keeps its tensors' identity, and steps as another does;
with float32 main weights and a real actor in tests/checkpoint/test_training_state.py."""

from types import SimpleNamespace

import pytest
import torch

from megatron_riskpo.actor.optimizer_offload import OffloadedState


def trained_model():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model, adam):
    model(torch.ones(5)).square().sum().backward()
    adam.step()
    adam.zero_grad()


def moments(adam):
    return [t for state in adam.state.values() for name, t in state.items() if name != "step"]


def test_state_is_there_only_during_the_step_and_steps_are_the_same():
    (model, adam), (plain_model, plain_adam) = trained_model(), trained_model()
    main = torch.randn(7)
    expected_main = main.clone()
    wrapper = SimpleNamespace(optimizer=adam, fp32_from_float16_groups=[[main, None]])
    offloaded = OffloadedState(wrapper)  # type: ignore[arg-type]
    kept = None
    for _ in range(3):
        assert main.untyped_storage().nbytes() == 0
        assert all(t.untyped_storage().nbytes() == 0 for t in moments(adam))
        with offloaded.on_device():
            assert torch.equal(main, expected_main)
            step(model, adam)
            main += 1
        expected_main += 1
        step(plain_model, plain_adam)
        kept = kept or moments(adam)
        assert all(a is b for a, b in zip(kept, moments(adam), strict=True))
    assert torch.equal(model.weight, plain_model.weight)
    with offloaded.on_device():
        assert all(torch.equal(a, b) for a, b in zip(moments(adam), moments(plain_adam), strict=True))


def test_an_error_in_the_body_gives_the_memory_back():
    model, adam = trained_model()
    offloaded = OffloadedState(SimpleNamespace(optimizer=adam))  # type: ignore[arg-type]
    with offloaded.on_device():
        step(model, adam)
    with pytest.raises(RuntimeError, match="inside"), offloaded.on_device():
        raise RuntimeError("inside")
    assert all(t.untyped_storage().nbytes() == 0 for t in moments(adam))
