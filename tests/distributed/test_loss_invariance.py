"""Loss, gradient and metrics do not depend on how a mini-batch is cut: micro-batches of 1 (nothing packed), 3, 8 and
all sequences, on 1, 2 and 4 data-parallel ranks, on real megatron-core over gloo; every loss and aggregation, with
masked and weighted tokens, KL to a reference and entropy bonus on.

Second way to each number: transformers, one padded batch, one call of policy_loss, autograd. Tensor and pipeline
parallelism are in test_parallel_invariance, the losses themselves in tests/algorithms/test_policy_loss.
"""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_riskpo.algorithms.covariance import covariant_tokens
from megatron_riskpo.algorithms.policy_loss import loss_normalizer, policy_loss
from megatron_riskpo.algorithms.segments import count_kept
from megatron_riskpo.algorithms.surrogates import SURROGATES
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from tests.distributed.compare import relative_error, worst_tensor
from tests.distributed.loss_cases import (
    LOSSES,
    MAX_RESPONSE_TOKENS,
    MICRO_BATCH_SIZES,
    NUM_SEQUENCES,
    TEMPERATURE,
    run,
    the_rollouts,
)
from tests.distributed.ranks import run_on_ranks
from tests.tiny_models import load_hf, make_tiny_qwen2

RELATIVE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    make_tiny_qwen2(folder / "model", tied=True, seed=3, hidden_size=64)
    logprobs, _ = by_transformers(load_hf(folder / "model"))
    torch.save(asdict(some_tokens(logprobs.detach())), folder / "tokens.pt")
    return folder


@pytest.fixture(scope="module")
def by_ranks(folder) -> dict[int, list[dict]]:
    return {n: run_on_ranks(f"{run.__module__}:{run.__name__}", n, folder / str(n)) for n in (1, 2, 4)}


def by_transformers(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of every response token, with a graph."""
    rollouts, _ = the_rollouts()
    sequences = rollouts.sequences()
    # Padding comes last, where causal attention lets no real token see it.
    logits = model(torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)).logits / TEMPERATURE
    logprobs, entropies = [], []
    for row, (sequence, prompt) in enumerate(zip(sequences, rollouts.prompt_lengths.tolist(), strict=True)):
        distribution = logits[row, prompt - 1 : len(sequence) - 1].log_softmax(-1)
        logprobs.append(distribution.gather(-1, sequence[prompt:, None])[:, 0])
        entropies.append(-(distribution.exp() * distribution).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def some_tokens(logprobs: Tensor) -> TokenInputs:
    """Old and reference log-probs near the policy's, weights, and a mask that leaves nothing of one response."""
    g = torch.Generator().manual_seed(9)
    rollouts, _ = the_rollouts()
    keep = torch.rand(logprobs.numel(), generator=g) > 0.2
    rollouts.split_by_response(keep)[4].zero_()
    return TokenInputs(
        old_logprobs=logprobs + 0.2 * torch.randn(logprobs.numel(), generator=g),
        ref_logprobs=logprobs + 0.3 * torch.randn(logprobs.numel(), generator=g),
        weights=0.5 + torch.rand(logprobs.numel(), generator=g),
        keep=keep,
    )


@pytest.mark.parametrize("case", LOSSES, ids=" ".join)
def test_no_cut_changes_anything(by_ranks, case):
    reference = by_ranks[1][0][*case, NUM_SEQUENCES]
    assert reference["metrics"]["actor/grad_norm"] > 1e-3
    for num_ranks, results in by_ranks.items():
        for result in results:
            for size in MICRO_BATCH_SIZES:
                found, where = result[*case, size], f"{num_ranks} ranks, micro-batches of {size}"
                assert found["metrics"] == pytest.approx(reference["metrics"], rel=RELATIVE, abs=1e-7), where
                assert relative_error(found["gradient"], reference["gradient"]) < RELATIVE, where
                assert worst_tensor(found["gradient"], reference["gradient"]) < 1e-5, where


@pytest.fixture(scope="module")
def model_and_graph(folder) -> tuple[torch.nn.Module, Tensor, Tensor]:
    model = load_hf(folder / "model")
    return model, *by_transformers(model)


@pytest.mark.parametrize("case", LOSSES, ids=" ".join)
def test_equals_transformers_and_autograd(folder, by_ranks, model_and_graph, case):
    model, logprobs, entropies = model_and_graph
    found, config = by_ranks[1][0][*case, NUM_SEQUENCES], LOSSES[case]
    rollouts, advantages = the_rollouts()
    lengths, tokens = rollouts.response_lengths, TokenInputs(**torch.load(folder / "tokens.pt"))
    if SURROGATES[config.kind].needs_penalised:
        chosen = covariant_tokens(tokens.old_logprobs, advantages, lengths, config.cov_fraction, tokens.keep)
        assert 1 < int(chosen.sum()) < chosen.numel() / 10
        tokens = replace(tokens, penalised=chosen)
    kept = count_kept(lengths, tokens.keep)
    normalizer = loss_normalizer(config, kept, MAX_RESPONSE_TOKENS)
    outputs = policy_loss(logprobs, advantages, lengths, config, normalizer, tokens, entropies, float(kept.sum()))
    expected: dict[str, Any] = {name: float(value) for name, value in outputs.metrics.items()}
    expected["actor/entropy"] = float(entropies.detach().mean())
    parameters = dict(model.named_parameters())
    gradient = dict(
        zip(parameters, torch.autograd.grad(outputs.loss, parameters.values(), retain_graph=True), strict=True)
    )
    expected["actor/grad_norm"] = float(torch.stack([g.norm() for g in gradient.values()]).norm())
    expected["actor/skipped_steps"] = 0
    assert found["metrics"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert relative_error({name: found["gradient"][name] for name in gradient}, gradient) < 1e-5
