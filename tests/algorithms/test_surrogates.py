"""Every surrogate against its published definition in plain python, finite differences and REINFORCE."""

import dataclasses
import math

import pytest
import torch

from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.surrogates import SURROGATES, SurrogateInputs
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from tests.algorithms.plain_loss import AGGREGATIONS, KINDS, LENGTHS, Batch, make_batch, plain_loss

BOUNDS = {"clip_low": 0.1, "clip_high": 0.25}
CONFIGS = [
    PolicyLossConfig(kind=kind, aggregation=aggregation, cov_kl_coefficient=0.7, **BOUNDS)
    for kind in KINDS
    for aggregation in AGGREGATIONS
]
DUAL_CLIP = [PolicyLossConfig(kind=kind, dual_clip=1.3, **BOUNDS) for kind in ("ppo", "gspo")]


def name(config):
    return f"{config.kind}-{config.aggregation}" + ("-dual" if config.dual_clip else "")


def test_the_registry_is_what_is_tested_here_and_says_its_source():
    assert set(SURROGATES) == set(KINDS)
    option_names = {field.name for field in dataclasses.fields(PolicyLossConfig)}
    for surrogate in SURROGATES.values():
        assert "(arXiv " in surrogate.description
        assert "\n" not in surrogate.description
        assert surrogate.options <= option_names


@pytest.mark.parametrize("config", CONFIGS + DUAL_CLIP, ids=name)
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_definition(config, masked):
    for seed in range(3):
        batch = make_batch(seed=seed, masked=masked)
        assert float(batch.loss(config).loss) == pytest.approx(plain_loss(batch, config), rel=1e-12)
        bare = dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, weights=None))
        assert float(bare.loss(config).loss) == pytest.approx(plain_loss(bare, config), rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS + DUAL_CLIP, ids=name)
def test_gradient_against_finite_differences_of_the_definition(config):
    batch = make_batch(seed=1)
    logprobs = batch.logprobs.clone().requires_grad_()
    batch.loss(config, logprobs=logprobs).loss.backward()
    step = 1e-5
    for t in range(len(logprobs)):
        up, down = batch.logprobs.clone(), batch.logprobs.clone()
        up[t] += step
        down[t] -= step
        above, below = (
            plain_loss(dataclasses.replace(batch, logprobs=moved), config, batch.logprobs) for moved in (up, down)
        )
        assert float(logprobs.grad[t]) == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.kind != "cispo"] + DUAL_CLIP, ids=name)
def test_gradcheck(config):
    """cispo's value is not what its gradient belongs to; the test above knows that."""
    batch = make_batch(seed=2)
    logprobs = batch.logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: batch.loss(config, logprobs=x).loss, logprobs, eps=1e-7, atol=1e-7)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize("old_is_given", [True, False])
def test_on_policy_every_gradient_is_that_of_reinforce(config, old_is_given):
    """At pi = pi_old: -A grad log pi, aggregated; nothing on the tokens that clip_cov drops."""
    batch = make_batch(masked=False)
    old, penalised = batch.tokens.old_logprobs, batch.tokens.penalised
    logprobs = old.clone().requires_grad_()
    tokens = TokenInputs(old_logprobs=old if old_is_given else None, penalised=penalised)
    batch.loss(config, logprobs=logprobs, tokens=tokens).loss.backward()
    per_response = {
        "sequence_mean": 1 / LENGTHS / len(LENGTHS),
        "token_mean": torch.ones(len(LENGTHS)) / LENGTHS.sum(),
        "sequence_mean_token_sum_norm": torch.ones(len(LENGTHS)) / 8 / len(LENGTHS),
    }[config.aggregation]
    expected = -(batch.advantages * per_response).repeat_interleave(LENGTHS)
    if config.kind == "clip_cov":
        expected[penalised] = 0
    torch.testing.assert_close(logprobs.grad, expected)


def one_token_each(ratios, advantages, config):
    """Responses of one token; log pi is the log-ratio."""
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    lengths = torch.ones(len(ratios), dtype=torch.long)
    advantages = torch.tensor(advantages, dtype=torch.float64)
    penalised = torch.tensor([False] * (len(ratios) - 1) + [True])
    return SURROGATES[config.kind].compute(
        SurrogateInputs(log_ratio, log_ratio, advantages, lengths, config, penalised=penalised)
    )


@pytest.mark.parametrize(
    ("kind", "options", "clipped"),
    [
        # where the bound, and not the ratio, is the smaller objective: too likely and good, too unlikely and bad
        ("ppo", {}, [1, 0, 0, 1, 0, 0]),
        ("gspo", {}, [1, 0, 0, 1, 0, 0]),
        ("gmpo", {}, [1, 0, 0, 1, 0, 0]),
        # and, with dual clip, where it is very likely and bad
        ("ppo", {"dual_clip": 1.4}, [1, 0, 1, 1, 0, 0]),
        ("gspo", {"dual_clip": 1.6}, [1, 0, 0, 1, 0, 0]),
        # whatever the advantage
        ("cispo", {}, [1, 1, 1, 1, 0, 0]),
        # and the dropped one
        ("clip_cov", {}, [1, 0, 0, 1, 0, 1]),
        ("kl_cov", {}, [0] * 6),
        ("reinforce", {}, [0] * 6),
    ],
)
def test_where_a_bound_cuts_the_gradient(kind, options, clipped):
    ratios, advantages = [1.5, 0.5, 1.5, 0.5, 1.1, 1.0], [1.0, 1.0, -1.0, -1.0, 1.0, -1.0]
    config = PolicyLossConfig(kind=kind, clip_low=0.2, clip_high=0.2, **options)
    outputs = one_token_each(ratios, advantages, config)
    assert outputs.clip_fraction.tolist() == clipped
    assert outputs.ratio.tolist() == pytest.approx(ratios)


def test_dual_clip_bounds_the_objective_of_a_bad_token_that_became_likely():
    config = PolicyLossConfig(kind="ppo", dual_clip=3.0)
    assert one_token_each([50.0, 2.0, 50.0], [-2.0, -2.0, 2.0], config).objective.tolist() == pytest.approx(
        [-6.0, -4.0, 2.4]
    )


def test_a_response_ratio_is_the_geometric_mean_of_its_tokens():
    config = PolicyLossConfig(kind="gspo", clip_low=1.0, clip_high=9.0)
    log_ratio = torch.tensor([2.0, 8.0, 0.5], dtype=torch.float64).log()
    lengths, advantages = torch.tensor([2, 1]), torch.tensor([3.0, -1.0], dtype=torch.float64)
    outputs = SURROGATES["gspo"].compute(SurrogateInputs(log_ratio, log_ratio, advantages, lengths, config))
    assert outputs.ratio.tolist() == pytest.approx([4.0, 0.5])
    assert outputs.objective.tolist() == pytest.approx([12.0, -0.5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_stays_finite_when_the_policies_have_come_apart(kind, gap):
    batch = make_batch(torch.float32)
    logprobs = (batch.tokens.old_logprobs + gap).requires_grad_()
    loss = batch.loss(PolicyLossConfig(kind=kind, kl_coefficient=0.1), logprobs=logprobs).loss
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_held_back_tokens_must_be_given(kind):
    batch = make_batch()
    tokens = dataclasses.replace(batch.tokens, penalised=None)
    with pytest.raises(ValueError, match=f"{kind} needs penalised"):
        batch.loss(PolicyLossConfig(kind=kind), tokens=tokens)


def test_kl_cov_pulls_held_back_tokens_towards_the_old_policy():
    config = PolicyLossConfig(kind="kl_cov", cov_kl_coefficient=2.0)
    logprobs = torch.tensor([-1.0, -3.0, -1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-2.0, -2.0, -2.0], dtype=torch.float64)
    tokens = TokenInputs(old_logprobs=old, penalised=torch.tensor([True, True, False]))
    batch = Batch(logprobs, torch.zeros(1, dtype=torch.float64), tokens, lengths=torch.tensor([3]))
    loss = batch.loss(config).loss
    assert float(loss.detach()) == pytest.approx(2.0 * 2 / 3)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([2 / 3, -2 / 3, 0])


def test_gmpo_bounds_are_of_the_log_ratio():
    config = PolicyLossConfig(kind="gmpo", clip_low=0.4, clip_high=0.6)
    objective = one_token_each([9.0, 0.1, 9.0, 0.1], [1.0, 1.0, -1.0, -1.0], config).objective
    assert objective.tolist() == pytest.approx([math.exp(0.6), 0.1, -9.0, -math.exp(-0.4)])
