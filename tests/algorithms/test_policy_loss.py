"""The whole policy loss: aggregation, masks, KL and entropy terms, and the cut into micro-batches."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.policy_loss import loss_normalizer, policy_loss, validate_policy_loss
from megatron_riskpo.algorithms.segments import count_kept
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.errors import UsageError
from tests.algorithms.plain_loss import AGGREGATIONS, KINDS, LENGTHS, MAX_RESPONSE_TOKENS, Batch, make_batch, plain_loss

EVERYTHING = {"clip_low": 0.1, "clip_high": 0.3, "entropy_coefficient": 0.02, "kl_coefficient": 0.3}
CUTS = {
    1: [[0], [1], [2], [3], [4], [5]],
    3: [[5, 0], [1, 2, 3], [4]],
    6: [[3, 4, 5, 0, 1, 2]],
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("masked", [False, True])
def test_kl_and_entropy_terms_against_a_plain_loop(aggregation, estimator, masked):
    batch = make_batch(masked=masked)
    config = PolicyLossConfig(aggregation=aggregation, kl_estimator=estimator, **EVERYTHING)
    assert float(batch.loss(config).loss) == pytest.approx(plain_loss(batch, config), rel=1e-12)
    logprobs, entropy = batch.logprobs.clone().requires_grad_(), batch.entropy.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, e: batch.loss(config, logprobs=x, entropy=e).loss, (logprobs, entropy), eps=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("num_parts", CUTS)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_does_not_depend_on_the_cut_into_micro_batches(kind, aggregation, num_parts, dtype, rel):
    """With everything on; one response, so in some cuts a whole micro-batch, is masked."""
    batch = make_batch(dtype)
    config = PolicyLossConfig(kind=kind, aggregation=aggregation, **EVERYTHING)
    kept = count_kept(LENGTHS, batch.tokens.keep)
    assert kept.min() == 0
    normalizer = loss_normalizer(config, kept, MAX_RESPONSE_TOKENS)
    whole, cut = batch.logprobs.clone().requires_grad_(), batch.logprobs.clone().requires_grad_()
    expected = batch.loss(config, logprobs=whole)
    expected.loss.backward()
    losses, metrics = [], dict.fromkeys(expected.metrics, 0.0)
    for rows in CUTS[num_parts]:
        columns = TokenInputs(ref_logprobs=cut, weights=batch.entropy).select(LENGTHS, rows)
        part = policy_loss(
            columns.ref_logprobs, batch.advantages[rows], LENGTHS[rows], config, normalizer,
            batch.tokens.select(LENGTHS, rows), columns.weights, float(kept.sum()),
        )  # fmt: skip
        part.loss.backward()
        losses.append(float(part.loss.detach()))
        metrics = {key: metrics[key] + float(part.metrics[key]) for key in metrics}
    # Responses of both signs may cancel in the sum: what is exact to `rel` are the terms, of size 1 to 3.
    loss = pytest.approx(float(expected.loss.detach()), rel=rel, abs=rel)
    assert sum(losses) == loss
    assert metrics.pop("actor/loss") == loss
    assert metrics == pytest.approx({key: float(expected.metrics[key]) for key in metrics}, rel=rel)
    torch.testing.assert_close(cut.grad, whole.grad, rtol=rel, atol=rel / 1e3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_tokens_are_as_if_they_were_not_there(kind, aggregation):
    """Loss, gradient and metrics equal those of shorter responses, whatever stands at the masked places."""
    batch = make_batch()
    keep = batch.tokens.keep
    config = PolicyLossConfig(kind=kind, aggregation=aggregation, **EVERYTHING)
    kept = count_kept(LENGTHS, keep)
    short_tokens = TokenInputs(
        *(getattr(batch.tokens, name)[keep] for name in ("old_logprobs", "ref_logprobs", "weights")),
        penalised=batch.tokens.penalised[keep],
    )
    rows = kept > 0
    short = Batch(batch.logprobs[keep], batch.advantages[rows], short_tokens, batch.entropy[keep], kept[rows])
    short_logprobs = short.logprobs.clone().requires_grad_()
    expected = short.loss(config, logprobs=short_logprobs)
    expected.loss.backward()
    logprobs = batch.logprobs.clone()
    logprobs[~keep] = math.nan
    logprobs.requires_grad_()
    outputs = batch.loss(config, logprobs=logprobs)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.metrics, expected.metrics)
    torch.testing.assert_close(logprobs.grad[keep], short_logprobs.grad)
    assert logprobs.grad[~keep].eq(0).all()


@given(
    kind=st.sampled_from(KINDS),
    aggregation=st.sampled_from(AGGREGATIONS),
    keep=st.lists(st.booleans(), min_size=int(LENGTHS.sum()), max_size=int(LENGTHS.sum())),
    seed=st.integers(0, 1000),
)
def test_any_mask_gives_a_finite_loss_and_no_gradient_where_it_masks(kind, aggregation, keep, seed):
    batch = make_batch(torch.float32, seed)
    keep = torch.tensor(keep)
    tokens = dataclasses.replace(batch.tokens, keep=keep)
    logprobs = batch.logprobs.clone().requires_grad_()
    config = PolicyLossConfig(kind=kind, aggregation=aggregation, **EVERYTHING)
    outputs = batch.loss(config, logprobs=logprobs, tokens=tokens)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert logprobs.grad.isfinite().all()
    assert logprobs.grad[~keep].eq(0).all()
    assert all(value.isfinite() for value in outputs.metrics.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_mini_batch_that_is_masked_as_a_whole_teaches_nothing(kind, aggregation):
    batch = make_batch(torch.float32)
    tokens = dataclasses.replace(batch.tokens, keep=torch.zeros_like(batch.tokens.keep))
    logprobs = batch.logprobs.clone().requires_grad_()
    config = PolicyLossConfig(kind=kind, aggregation=aggregation, **EVERYTHING)
    outputs = batch.loss(config, logprobs=logprobs, tokens=tokens)
    outputs.loss.backward()
    assert float(outputs.loss.detach()) == 0
    assert logprobs.grad.eq(0).all()
    assert {float(value) for value in outputs.metrics.values()} == {0.0}


@given(kept_lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), aggregation=st.sampled_from(AGGREGATIONS))
def test_normalizer(kept_lengths, aggregation):
    config = PolicyLossConfig(aggregation=aggregation)
    num_sequences = len([length for length in kept_lengths if length])
    expected = {
        "sequence_mean": num_sequences,
        "token_mean": sum(kept_lengths),
        "sequence_mean_token_sum_norm": num_sequences * 100,
    }[aggregation]
    normalizer = loss_normalizer(config, torch.tensor(kept_lengths), 100)
    assert type(normalizer) is float
    assert normalizer == (expected or 1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_metrics_are_means(aggregation, masked):
    """Of a constant, the constant: also under sequence_mean_token_sum_norm, whose loss is no mean."""
    batch = make_batch(masked=masked)
    old = batch.tokens.old_logprobs
    tokens = dataclasses.replace(batch.tokens, ref_logprobs=old + 0.5)
    config = PolicyLossConfig(kind="ppo", aggregation=aggregation, kl_estimator="k2")
    entropy = torch.full_like(old, 0.7)
    metrics = batch.loss(config, logprobs=old + math.log(1.1), tokens=tokens, entropy=entropy).metrics
    assert float(metrics["actor/ratio_mean"]) == pytest.approx(1.1)
    assert float(metrics["actor/approx_kl"]) == pytest.approx(0.1 - math.log(1.1))
    assert float(metrics["actor/entropy"]) == pytest.approx(0.7)
    assert float(metrics["actor/kl_ref"]) == pytest.approx((0.5 - math.log(1.1)) ** 2 / 2)


def test_metrics_by_hand():
    config = PolicyLossConfig(kind="ppo", aggregation="token_mean", clip_low=0.2, clip_high=0.2)
    ratios = torch.tensor([1.5, 0.5, 1.0, 1.5], dtype=torch.float64)
    lengths, advantages = torch.tensor([2, 2]), torch.tensor([1.0, -1.0])
    tokens = TokenInputs(old_logprobs=torch.zeros(4, dtype=torch.float64))
    outputs = policy_loss(ratios.log(), advantages, lengths, config, 4.0, tokens)
    # clipped: 1.5 with A > 0; not 0.5 with A > 0, nor 1.5 with A < 0, where the clip would raise the objective
    assert float(outputs.metrics["actor/clip_fraction"]) == 0.25
    assert float(outputs.metrics["actor/ratio_mean"]) == pytest.approx(4.5 / 4)
    k3 = [r - 1 - math.log(r) for r in ratios.tolist()]
    assert float(outputs.metrics["actor/approx_kl"]) == pytest.approx(sum(k3) / 4)
    assert float(outputs.metrics["actor/loss"]) == float(outputs.loss) == pytest.approx(-(1.2 + 0.5 - 1 - 1.5) / 4)
    assert outputs.metrics.keys() == {"actor/clip_fraction", "actor/ratio_mean", "actor/approx_kl", "actor/loss"}


@pytest.mark.parametrize("options", [{}, {"kl_coefficient": 0.3, "kl_in": "reward"}])
def test_kl_and_entropy_are_reported_but_build_no_graph_without_a_coefficient(options):
    batch = make_batch(masked=False)
    logprobs = batch.logprobs.clone().requires_grad_()
    with_them = batch.loss(PolicyLossConfig(**options), logprobs=logprobs, entropy=batch.entropy.requires_grad_())
    gradient = torch.autograd.grad(with_them.loss, [logprobs, batch.entropy], allow_unused=True)
    assert gradient[1] is None
    tokens = dataclasses.replace(batch.tokens, ref_logprobs=None)
    without = batch.loss(PolicyLossConfig(**options), logprobs=logprobs, tokens=tokens, entropy=None)
    torch.testing.assert_close(gradient[0], torch.autograd.grad(without.loss, logprobs)[0], rtol=0, atol=0)
    assert with_them.metrics.keys() - without.metrics.keys() == {"actor/entropy", "actor/kl_ref"}
    means = torch.stack([part.mean() for part in batch.entropy.detach().split(LENGTHS.tolist())])
    assert float(with_them.metrics["actor/entropy"]) == pytest.approx(float(means.mean()))
    assert not any(value.requires_grad for value in with_them.metrics.values())


def test_infinite_values_without_a_coefficient_do_not_reach_the_loss():
    batch = make_batch(masked=False)
    tokens = dataclasses.replace(batch.tokens, ref_logprobs=torch.full_like(batch.logprobs, -math.inf))
    outputs = batch.loss(PolicyLossConfig(), tokens=tokens, entropy=torch.full_like(batch.logprobs, math.inf))
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_without_old_logprobs_the_policy_itself_is_the_old_one(kind):
    batch = make_batch()
    given_old = dataclasses.replace(batch.tokens, old_logprobs=batch.logprobs)
    no_old = dataclasses.replace(batch.tokens, old_logprobs=None)
    gradients = []
    for tokens in (given_old, no_old):
        logprobs = batch.logprobs.clone().requires_grad_()
        batch.loss(PolicyLossConfig(kind=kind), logprobs=logprobs, tokens=tokens).loss.backward()
        gradients.append(logprobs.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_inputs_are_computed_in_float32(kind):
    """As the same numbers in float64 are; the old log-probs differ by less than bfloat16 resolves after a product."""
    low = make_batch(torch.bfloat16)
    config = PolicyLossConfig(kind=kind, **EVERYTHING)

    def doubled(values):
        return values.double() if values is not None and values.is_floating_point() else values

    fields = {field.name: doubled(getattr(low.tokens, field.name)) for field in dataclasses.fields(low.tokens)}
    high = Batch(low.logprobs.double(), low.advantages.double(), TokenInputs(**fields), low.entropy.double())
    loss = low.loss(config).loss
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(high.loss(config).loss), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (PolicyLossConfig(entropy_coefficient=0.1), {"entropy": None}, "no entropy"),
        (PolicyLossConfig(kl_coefficient=0.1), {"tokens": TokenInputs()}, "no ref_logprobs"),
        (PolicyLossConfig(), {"advantages": torch.zeros(5)}, "an advantage a response"),
        (PolicyLossConfig(), {"entropy": torch.zeros(3)}, "entropy has shape"),
        (PolicyLossConfig(), {"tokens": TokenInputs(weights=torch.ones(3))}, "weights has shape"),
    ],
)
def test_missing_inputs_and_wrong_shapes_are_refused(config, changes, said):
    with pytest.raises(ValueError, match=said):
        make_batch().loss(config, **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[3, 3], [1, 2], [6, -1], []])
def test_lengths_that_are_not_those_of_the_tokens_are_refused(lengths, kind):
    """Of 5 tokens: too many, too few, negative, none at all."""
    penalised = torch.zeros(5, dtype=torch.bool)
    with pytest.raises(ValueError, match="add up to") as caught:
        policy_loss(
            torch.zeros(5), torch.zeros(len(lengths)), torch.tensor(lengths, dtype=torch.int64),
            PolicyLossConfig(kind=kind), 1.0, TokenInputs(penalised=penalised),
        )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("num_responses", [0, 2])
def test_a_micro_batch_without_tokens_contributes_nothing(num_responses, aggregation, kind):
    logprobs, entropy = torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True)
    none = torch.zeros(num_responses, dtype=torch.int64)
    nothing = logprobs.detach()
    tokens = TokenInputs(nothing, nothing, nothing, nothing.bool(), nothing.bool())
    config = PolicyLossConfig(kind=kind, aggregation=aggregation, **EVERYTHING)
    outputs = policy_loss(logprobs, none.float(), none, config, 1.0, tokens, entropy, num_tokens=0.0)
    outputs.loss.backward()
    assert logprobs.grad.shape == (0,)
    assert {float(value) for value in outputs.metrics.values()} == {0.0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip_low": 1.5}, "loss.clip_low = 1.5 is out of range: it must be between 0 and 1"),
        ({"kind": "gmpo", "clip_low": -0.5}, "0 or more"),
        ({"clip_high": -0.1}, "0 or more"),
        ({"entropy_coefficient": float("nan")}, "0 or more"),
        ({"kl_coefficient": -1.0}, "0 or more"),
        ({"dual_clip": 1.0}, "more than 1, or 0 for off"),
        ({"dual_clip": -3.0}, "0 or more"),
        ({"kind": "kl_cov", "cov_fraction": 0.0}, "more than 0"),
        ({"kind": "kl_cov", "cov_fraction": 1.5}, "between 0 and 1"),
        ({"kind": "kl_cov", "cov_kl_coefficient": -1.0}, "0 or more"),
        ({"kind": "gsop"}, "did you mean gspo"),
        ({"kl_estimator": "k4"}, "choose from k1, k2, k3"),
        ({"kl_estimator": "k1", "kl_coefficient": 0.1}, "choose k2 or k3, or loss.kl_in = reward"),
        ({"aggregation": "token"}, "did you mean token_mean"),
        ({"kind": "cispo", "dual_clip": 3.0}, "no effect on loss.kind = cispo: leave it out, or use gspo, ppo"),
        ({"kind": "reinforce", "clip_high": 0.28}, "no effect on loss.kind = reinforce"),
        ({"kind": "ppo", "cov_fraction": 0.1}, "no effect on loss.kind = ppo: leave it out, or use clip_cov, kl_cov"),
        ({"kind": "clip_cov", "cov_kl_coefficient": 0.5}, "or use kl_cov"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said) as caught:
        validate_policy_loss(PolicyLossConfig(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        *({"kind": kind} for kind in KINDS),
        {"kind": "gmpo", "clip_low": 1.5},
        {"kind": "ppo", "dual_clip": 3.0, "clip_high": 0.28},
        {"kind": "kl_cov", "cov_fraction": 1.0, "cov_kl_coefficient": 0.0},
        {"kl_coefficient": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
    ],
)
def test_possible_options_are_accepted(options):
    validate_policy_loss(PolicyLossConfig(**options))
