"""Log-probs and entropy against log_softmax of whole logits in float64, values and gradients, in one process.

Several ranks: tests/distributed/test_logprobs.py.
"""

import random

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_riskpo.actor import logprobs as module
from megatron_riskpo.actor.logprobs import vocab_parallel_logprobs
from megatron_riskpo.algorithms import PolicyLossConfig, policy_loss
from megatron_riskpo.algorithms.token_inputs import TokenInputs

NUM_ROWS, HIDDEN, VOCAB = 37, 16, 61


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "s"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def chunk_width(monkeypatch):
    def set_width(width):
        monkeypatch.setattr(module, "MIN_CHUNK_WIDTH", width)
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 1})

    return set_width


def inputs(dtype=torch.float32, num_padding=0, shape=(NUM_ROWS, HIDDEN, VOCAB)):
    """Hidden states, weights (the last num_padding rows are padding), targets; logits have a deviation of about 3."""
    num_rows, hidden_size, vocab_size = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = 3 / hidden_size**0.5 * torch.randn(vocab_size + num_padding, hidden_size, generator=generator)
    return hidden, weight.to(dtype).requires_grad_(), torch.randint(0, vocab_size, (num_rows,), generator=generator)


def reference(hidden, weight, targets, temperature, vocab_size=VOCAB):
    """[2, n] float64, and leaves to take gradients of."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    log_p = (hidden @ weight[:vocab_size].t() / temperature).log_softmax(-1)
    values = torch.stack([log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])
    return values, hidden, weight


def coefficients(rows, num_rows=NUM_ROWS):
    """What a loss multiplies the outputs by, [2, n]: 1 = log-prob, entropy in `rows`, 0 elsewhere."""
    return torch.randn(2, num_rows, generator=torch.Generator().manual_seed(1)) * torch.tensor(rows)[:, None]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize(
    ("width", "num_padding"),
    [(VOCAB, 0), (1000, 3), (1, 0), (7, 0), (VOCAB - 1, 3), (20, 19)],
    ids=["one", "wide", "single entries", "ragged", "last of one", "padding of a chunk"],
)
def test_values_and_gradients(group, chunk_width, temperature, width, num_padding):
    chunk_width(width)
    hidden, weight, targets = inputs(num_padding=num_padding)
    values = torch.stack(vocab_parallel_logprobs(hidden, weight, targets, 0, VOCAB, temperature, group))
    expected, hidden64, weight64 = reference(hidden, weight, targets, temperature)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=5e-6)
    (values * coefficients([1.0, 1.0])).sum().backward()
    (expected * coefficients([1.0, 1.0])).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=0, atol=1e-5)
    assert not weight.grad[VOCAB:].any()


@pytest.mark.parametrize("seed", range(40))
def test_any_shape(group, chunk_width, seed):
    """Few positions or many beside the hidden size decide how many logits are kept, and where."""
    draw = random.Random(seed)
    shape = num_rows, _, vocab_size = draw.randint(1, 80), draw.randint(1, 40), draw.randint(2, 90)
    chunk_width(draw.randint(1, 30))
    hidden, weight, targets = inputs(torch.float64, draw.choice([0, 5]), shape)
    values = torch.stack(vocab_parallel_logprobs(hidden, weight, targets, 0, vocab_size, 0.8, group))
    expected, hidden64, weight64 = reference(hidden, weight, targets, 0.8, vocab_size)
    factors = coefficients([1.0, 1.0], num_rows)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((values * factors).sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad((values * factors).sum(), (hidden, weight))
    exact = torch.autograd.grad((expected * factors).sum(), (hidden64, weight64))
    torch.testing.assert_close(gradients, exact, rtol=0, atol=1e-12)
    # The second time none of the logits is there any more.
    torch.testing.assert_close(again, gradients, rtol=0, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that an operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("with_graph", [True, False])
def test_whole_logits_never_exist(group, chunk_width, with_graph):
    num_rows, hidden_size, vocab_size = shape = 300, 10, 200
    chunk_width(8)
    hidden, weight, targets = inputs(shape=shape)
    with torch.set_grad_enabled(with_graph), LargestTensor() as largest:
        logprobs, entropy = vocab_parallel_logprobs(hidden, weight, targets, 0, vocab_size, 1.0, group)
        if with_graph:
            (logprobs.sum() + entropy.sum()).backward()
    assert largest.size <= max(num_rows, vocab_size) * hidden_size < num_rows * vocab_size / 10


@pytest.mark.parametrize("rows", [[1.0, 0.0], [0.0, 1.0]], ids=["log-probs", "entropy"])
def test_gradient_of_one_output_alone(group, chunk_width, rows):
    chunk_width(10)
    hidden, weight, targets = inputs(torch.float64)
    used = rows.index(1.0)
    values = vocab_parallel_logprobs(hidden, weight, targets, 0, VOCAB, 0.9, group)[used]
    expected, hidden64, weight64 = reference(hidden, weight, targets, 0.9)
    (values * coefficients(rows)[used]).sum().backward()
    (expected * coefficients(rows)).sum().backward()
    torch.testing.assert_close(hidden.grad, hidden64.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(weight.grad, weight64.grad, rtol=0, atol=1e-12)


def test_gradients_against_finite_differences(group, chunk_width):
    chunk_width(25)
    hidden, weight, targets = inputs(torch.float64, num_padding=2)
    few = [hidden[:4].detach().requires_grad_(), weight]
    assert torch.autograd.gradcheck(
        lambda hidden, weight: vocab_parallel_logprobs(hidden, weight, targets[:4], 0, VOCAB, 0.8, group), few
    )


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_entropy_costs_nothing_in_the_backward_pass_unless_it_is_in_the_loss(group, monkeypatch, coefficient):
    """Its gradient is then None, not zeros, and the branch for it is not taken."""
    slopes = []
    inner = module._grad_logits
    monkeypatch.setattr(module, "_grad_logits", lambda *args: (slopes.append(args[1]), inner(*args))[1])
    hidden, weight, targets = inputs()
    logprobs, entropy = vocab_parallel_logprobs(hidden, weight, targets, 0, VOCAB, 1.0, group)
    config = PolicyLossConfig(entropy_coefficient=coefficient)
    outputs = policy_loss(
        logprobs, torch.ones(1), torch.tensor([NUM_ROWS]), config, 1.0, TokenInputs(), entropy=entropy
    )
    outputs.loss.backward()
    assert outputs.metrics["actor/entropy"] > 0
    assert [slope is None for slope in slopes] == [coefficient == 0]


def test_large_logits_neither_overflow_nor_lose_digits(group, chunk_width):
    """Maxima that rise from chunk to chunk, by more than exp can tell."""
    chunk_width(8)
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = 1.0, torch.linspace(-400, 400, VOCAB)
    values = torch.stack(vocab_parallel_logprobs(hidden, weight, targets, 0, VOCAB, 1.0, group))
    expected, *_ = reference(hidden, weight, targets, 1.0)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-4)
    values.sum().backward()
    assert weight.grad.isfinite().all()


def test_bfloat16_inputs_are_not_edited_and_close(group, chunk_width):
    chunk_width(16)
    hidden, weight, targets = inputs(torch.bfloat16, num_padding=3)
    before = [tensor.detach().clone() for tensor in (hidden, weight)]
    values = torch.stack(vocab_parallel_logprobs(hidden, weight, targets, 0, VOCAB, 0.5, group))
    assert values.dtype == torch.float32
    (values * coefficients([1.0, 1.0])).sum().backward()
    for tensor, copy in zip((hidden, weight), before, strict=True):
        assert torch.equal(tensor.detach().view(torch.int16), copy.view(torch.int16))
        assert tensor.grad.dtype == torch.bfloat16
    expected, hidden64, weight64 = reference(hidden, weight, targets, 0.5)
    (expected * coefficients([1.0, 1.0])).sum().backward()
    # Logits of about 10 have an error of up to 2^-6 in bfloat16.
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0.1)
    for grad, exact in ((hidden.grad, hidden64.grad), (weight.grad, weight64.grad)):
        assert torch.dist(grad.double(), exact) < 0.01 * exact.norm()


def test_no_positions(group):
    hidden, weight, _ = inputs()
    none = hidden[:0]
    logprobs, entropy = vocab_parallel_logprobs(none, weight, torch.zeros(0, dtype=torch.long), 0, VOCAB, 1.0, group)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert not weight.grad.any()
