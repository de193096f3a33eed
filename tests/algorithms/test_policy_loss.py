"""The policy loss against a plain loop, finite differences and its closed form on-policy, and cut into parts."""

import math

import pytest
import torch

from megatron_riskpo.algorithms import PolicyLossConfig, loss_normalizer, policy_loss, validate_policy_loss
from megatron_riskpo.errors import UsageError

LENGTHS = torch.tensor([3, 1, 7, 4, 2, 5])
CONFIGS = [
    PolicyLossConfig(ratio=ratio, aggregation=aggregation, clip_low=0.1, clip_high=0.3, entropy_coefficient=entropy)
    for ratio in ("sequence", "token")
    for aggregation in ("sequence_mean", "token_mean")
    for entropy in (0.0, 0.02)
]


def batch(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old, noise, entropy = torch.randn(3, int(LENGTHS.sum()), dtype=dtype, generator=generator)
    advantages = torch.randn(len(LENGTHS), dtype=dtype, generator=generator)
    return old + 0.25 * noise, old, advantages, entropy.abs()


def plain_loss(logprobs, old, advantages, entropy, config):
    """The definition, one sequence and one token at a time."""
    start, per_sequence = 0, []
    for length, advantage in zip(LENGTHS.tolist(), advantages.tolist(), strict=True):
        log_ratios = [float(logprobs[t] - old[t]) for t in range(start, start + length)]
        if config.ratio == "sequence":
            log_ratios = [sum(log_ratios) / length] * length
        objectives = []
        for t, log_ratio in enumerate(log_ratios):
            ratio = math.exp(log_ratio)
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            bonus = config.entropy_coefficient * float(entropy[start + t])
            objectives.append(min(ratio * advantage, clipped * advantage) + bonus)
        per_sequence.append(objectives)
        start += length
    if config.aggregation == "sequence_mean":
        return -sum(sum(o) / len(o) for o in per_sequence) / len(per_sequence)
    return -sum(map(sum, per_sequence)) / start


def loss_of(logprobs, old, advantages, entropy, config):
    normalizer = loss_normalizer(config, LENGTHS)
    return policy_loss(logprobs, old, advantages, LENGTHS, config, normalizer, entropy)


@pytest.mark.parametrize("config", CONFIGS)
def test_against_a_plain_loop(config):
    arguments = batch()
    assert float(loss_of(*arguments, config).loss) == pytest.approx(plain_loss(*arguments, config), rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradient_against_finite_differences(config):
    logprobs, old, advantages, entropy = batch()
    inputs = (logprobs.requires_grad_(), entropy.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, e: loss_of(x, old, advantages, e, config).loss, inputs, eps=1e-7, atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_does_not_depend_on_the_cut_into_micro_batches(config):
    logprobs, old, advantages, entropy = batch(torch.float32)
    normalizer = loss_normalizer(config, LENGTHS)
    whole = logprobs.clone().requires_grad_()
    expected = policy_loss(whole, old, advantages, LENGTHS, config, normalizer, entropy)
    expected.loss.backward()
    cut = logprobs.clone().requires_grad_()
    loss, metrics = 0.0, dict.fromkeys(expected.metrics, 0.0)
    for rows in ([0], [1, 2, 3], [4, 5]):
        tokens = slice(int(LENGTHS[: rows[0]].sum()), int(LENGTHS[: rows[-1] + 1].sum()))
        part = policy_loss(
            cut[tokens], old[tokens], advantages[rows], LENGTHS[rows], config, normalizer, entropy[tokens]
        )
        part.loss.backward()
        loss += float(part.loss.detach())
        metrics = {key: metrics[key] + float(part.metrics[key]) for key in metrics}
    assert loss == pytest.approx(float(expected.loss.detach()), rel=1e-6)
    assert metrics == pytest.approx({key: float(value) for key, value in expected.metrics.items()}, rel=1e-5)
    torch.testing.assert_close(cut.grad, whole.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", CONFIGS[::2])
def test_on_policy_gradient_is_reinforce(config):
    """At pi = pi_old: -sum_i A_i grad(mean log pi_i) / N, or with token means over all tokens."""
    _, old, advantages, _ = batch()
    logprobs = old.clone().requires_grad_()
    loss_of(logprobs, old, advantages, None, config).loss.backward()
    if config.aggregation == "sequence_mean":
        per_token = advantages / LENGTHS / len(LENGTHS)
    else:
        per_token = advantages / LENGTHS.sum()
    torch.testing.assert_close(logprobs.grad, -per_token.repeat_interleave(LENGTHS))


def test_metrics_by_hand():
    config = PolicyLossConfig(ratio="token", aggregation="token_mean", clip_low=0.2, clip_high=0.2)
    ratios = torch.tensor([1.5, 0.5, 1.0, 1.5], dtype=torch.float64)
    lengths, advantages = torch.tensor([2, 2]), torch.tensor([1.0, -1.0])
    outputs = policy_loss(ratios.log(), torch.zeros(4, dtype=torch.float64), advantages, lengths, config, 4.0)
    # clipped: 1.5 with A > 0; not 0.5 with A > 0, nor 1.5 with A < 0, where the clip would raise the objective
    assert float(outputs.metrics["actor/clip_fraction"]) == 0.25
    assert float(outputs.metrics["actor/ratio_mean"]) == pytest.approx(4.5 / 4)
    k3 = [r - 1 - math.log(r) for r in ratios.tolist()]
    assert float(outputs.metrics["actor/approx_kl"]) == pytest.approx(sum(k3) / 4)
    assert "actor/entropy" not in outputs.metrics


def test_entropy_is_reported_but_builds_no_graph_without_a_coefficient():
    logprobs, old, advantages, entropy = batch()
    outputs = loss_of(logprobs, old, advantages, entropy.requires_grad_(), PolicyLossConfig())
    assert not outputs.loss.requires_grad
    means = torch.stack([part.mean() for part in entropy.detach().split(LENGTHS.tolist())])
    assert float(outputs.metrics["actor/entropy"]) == pytest.approx(float(means.mean()))


@pytest.mark.parametrize("config", CONFIGS[::2])
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_stays_finite_when_the_policies_have_come_apart(config, gap):
    _, old, advantages, _ = batch(torch.float32)
    logprobs = (old + gap).requires_grad_()
    loss = loss_of(logprobs, old, advantages, None, config).loss
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()


def test_bfloat16_inputs_are_computed_in_float32():
    logprobs, old, advantages, _ = (x.bfloat16() for x in batch())
    loss = loss_of(logprobs, old, advantages, None, PolicyLossConfig()).loss
    assert loss.dtype == torch.float32
    expected = loss_of(logprobs.double(), old.double(), advantages.double(), None, PolicyLossConfig()).loss
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_an_entropy_bonus_without_entropy_and_wrong_shapes_are_refused():
    logprobs, old, advantages, _ = batch()
    with pytest.raises(ValueError, match="no entropy"):
        loss_of(logprobs, old, advantages, None, PolicyLossConfig(entropy_coefficient=0.1))
    with pytest.raises(ValueError, match="an advantage a response"):
        loss_of(logprobs, old, advantages[1:], None, PolicyLossConfig())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip_low": 1.5}, "between 0 and 1"),
        ({"clip_high": -0.1}, "0 or more"),
        ({"entropy_coefficient": float("nan")}, "0 or more"),
        ({"ratio": "tokens"}, "did you mean token"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        validate_policy_loss(PolicyLossConfig(**options))
