"""Log-probs and entropy against log_softmax, values and gradients; the two-rank case is in the layout tests."""

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.actor import logprobs as module
from megatron_riskpo.actor.logprobs import vocab_parallel_logprobs


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "s"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def reference(logits, targets, temperature):
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_elements", [2**24, 200])
def test_values_and_gradients(group, monkeypatch, temperature, chunk_elements):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(37, 61, generator=generator)
    targets = torch.randint(0, 61, (37,), generator=generator)
    weights = torch.randn(2, 37, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().double().requires_grad_()
    values = torch.stack(vocab_parallel_logprobs(ours, targets, 0, temperature, group))
    expected = torch.stack(reference(theirs, targets, temperature))
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=5e-6)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=5e-6)
    assert torch.equal(ours.detach(), logits)


def test_gradient_of_logprobs_alone(group):
    logits = torch.randn(9, 20, dtype=torch.float32, requires_grad=True)
    targets = torch.arange(9)
    vocab_parallel_logprobs(logits, targets, 0, 1.0, group)[0].sum().backward()
    expected = torch.nn.functional.one_hot(targets, 20) - logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def test_bfloat16_inputs_are_not_edited(group):
    logits = torch.randn(50, 64).bfloat16().requires_grad_()
    before = logits.detach().clone()
    logprobs, entropy = vocab_parallel_logprobs(logits, torch.zeros(50, dtype=torch.long), 0, 0.5, group)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(logits.detach(), before)
    assert logprobs.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
