"""Mismatch sums: additive, and estimates of a KL divergence that is known. Corrections against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_riskpo.algorithms.config import MismatchConfig, PolicyLossConfig
from megatron_riskpo.algorithms.mismatch import correct_mismatch, mismatch_sums, needs_old_logprobs, validate_mismatch
from megatron_riskpo.algorithms.policy_loss import policy_loss
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.errors import UsageError

CORRECTIONS = ("none", "tis", "tis_sequence", "mis", "geometric")


def test_parts_add_up_to_the_whole():
    rollout, trainer = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    parts = mismatch_sums(rollout[:20], trainer[:20]) + mismatch_sums(rollout[20:], trainer[20:])
    assert parts.metrics() == pytest.approx(mismatch_sums(rollout, trainer).metrics())
    assert parts.metrics()["mismatch/logprob_abs_max"] == pytest.approx(float((rollout - trainer).abs().max()))


def test_k1_and_k3_estimate_the_divergence_of_the_sampler_from_the_trainer():
    rollout, trainer = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).log_softmax(dim=1)
    tokens = torch.multinomial(rollout.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(2))
    divergence = float((rollout.exp() * (rollout - trainer)).sum())
    metrics = mismatch_sums(rollout[tokens], trainer[tokens]).metrics()
    assert metrics["mismatch/k1"] == pytest.approx(divergence, rel=0.05)
    assert metrics["mismatch/k3"] == pytest.approx(divergence, rel=0.05)


def test_perplexity_ratio():
    rollout, trainer = -torch.rand(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    perplexities = [math.exp(-sum(values.tolist()) / 30) for values in (rollout, trainer)]
    metrics = mismatch_sums(rollout, trainer).metrics()
    assert metrics["mismatch/perplexity_ratio"] == pytest.approx(perplexities[0] / perplexities[1])


def test_a_rank_without_tokens_adds_nothing():
    empty = mismatch_sums(torch.empty(0), torch.empty(0))
    some = mismatch_sums(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0]))
    assert (empty + some).metrics() == some.metrics()
    assert empty.metrics().pop("mismatch/perplexity_ratio") == 1
    assert {value for key, value in empty.metrics().items() if "perplexity" not in key} == {0.0}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -1e4])
def test_broken_logprobs_are_reported(broken):
    metrics = mismatch_sums(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, broken])).metrics()
    assert not metrics["mismatch/logprob_abs_mean"] <= 1
    assert len(metrics) == 5


def plain_correction(rollout, old, lengths, config):
    """Weight (None: masked) of every token."""
    result, start = [], 0
    for length in lengths:
        ratios = [math.exp(old[t] - rollout[t]) for t in range(start, start + length)]
        start += length
        product = math.prod(ratios)
        if config.correction == "tis":
            result += [min(ratio, config.cap) for ratio in ratios]
        elif config.correction == "tis_sequence":
            result += [min(product, config.cap)] * length
        elif config.correction == "mis":
            result += [ratio if 1 / config.cap <= ratio <= config.cap else None for ratio in ratios]
        elif config.correction == "geometric":
            is_near = length > 0 and 1 / config.cap <= product ** (1 / length) <= config.cap
            result += [1.0 if is_near else None] * length
        else:
            result += [1.0] * length
    return result


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("cap", [1.1, 1.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_corrections_against_a_loop(correction, cap, dtype):
    lengths = [3, 1, 0, 7, 4, 2, 5]
    generator = torch.Generator().manual_seed(4)
    rollout = torch.randn(22, dtype=dtype, generator=generator) - 2
    old = rollout + 0.3 * torch.randn(22, dtype=dtype, generator=generator)
    config = MismatchConfig(correction=correction, cap=cap)
    outputs = correct_mismatch(rollout, old, torch.tensor(lengths), config)
    expected = plain_correction(rollout.tolist(), old.tolist(), lengths, config)
    weights = torch.ones(22, dtype=dtype) if outputs.weights is None else outputs.weights
    keep = torch.ones(22, dtype=torch.bool) if outputs.keep is None else outputs.keep
    assert weights.dtype == dtype
    assert keep.tolist() == [weight is not None for weight in expected]
    kept = [weight for weight in expected if weight is not None]
    assert weights[keep].tolist() == pytest.approx(kept, rel=1e-6)
    assert outputs.metrics["mismatch/masked_fraction"] == pytest.approx(1 - len(kept) / 22)
    assert outputs.metrics["mismatch/weight_mean"] == pytest.approx(sum(kept) / len(kept), rel=1e-6)
    assert (outputs.weights is None) == (correction in ("none", "geometric"))
    assert (outputs.keep is None) == (correction in ("none", "tis", "tis_sequence"))


@given(
    st.sampled_from(CORRECTIONS),
    st.floats(1.01, 10),
    st.lists(st.lists(st.floats(-80, 80, width=32), max_size=4), min_size=1, max_size=5).filter(any),
)
def test_weights_are_positive_finite_and_bounded(correction, cap, differences):
    lengths = torch.tensor([len(part) for part in differences])
    old = torch.tensor([d for part in differences for d in part])
    outputs = correct_mismatch(torch.zeros_like(old), old, lengths, MismatchConfig(correction=correction, cap=cap))
    if outputs.weights is not None:
        kept = outputs.weights if outputs.keep is None else outputs.weights[outputs.keep]
        assert outputs.weights.isfinite().all()
        assert (outputs.weights > 0).all()
        assert (kept <= cap * (1 + 1e-6)).all()
    if outputs.keep is not None:
        # What is masked is what is far: the mask of responses is one for all their tokens.
        assert outputs.keep[old == 0].all() or correction == "geometric"
        if correction == "geometric":
            for part in outputs.keep.split(lengths.tolist()):
                assert len(set(part.tolist())) <= 1
    assert 0 <= outputs.metrics["mismatch/masked_fraction"] <= 1


@pytest.mark.parametrize("correction", ["tis", "tis_sequence", "mis"])
def test_log_ratios_stop_at_20(correction):
    old = torch.tensor([-90.0, -90.0, 900.0])
    config = MismatchConfig(correction=correction, cap=1e300)
    weights = correct_mismatch(torch.zeros(3), old, torch.tensor([2, 1]), config).weights
    assert weights.tolist() == pytest.approx([math.exp(-20), math.exp(-20), math.exp(20)], rel=1e-6)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_without_a_mismatch_nothing_changes(correction):
    logprobs = -torch.rand(6, generator=torch.Generator().manual_seed(5))
    outputs = correct_mismatch(logprobs, logprobs, torch.tensor([4, 2]), MismatchConfig(correction=correction))
    assert outputs.weights is None or outputs.weights.eq(1).all()
    assert outputs.keep is None or outputs.keep.all()
    assert outputs.metrics == {"mismatch/masked_fraction": 0, "mismatch/weight_mean": 1}


def test_importance_weights_make_the_expectation_that_of_the_trainer():
    """Without a cap that binds, E_rollout[w f] = E_old[f]; with one that binds, it is smaller for f > 0."""
    rollout, old = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).log_softmax(1)
    values = torch.arange(1.0, 6.0, dtype=torch.float64)
    expectations = {}
    for cap in (1e6, 1.05):
        config = MismatchConfig(correction="tis", cap=cap)
        weights = correct_mismatch(rollout, old, torch.ones(5, dtype=torch.long), config).weights
        expectations[cap] = float((rollout.exp() * weights * values).sum())
    assert expectations[1e6] == pytest.approx(float((old.exp() * values).sum()), rel=1e-12)
    assert expectations[1.05] < expectations[1e6]


def test_everything_masked_is_reported_as_such():
    config = MismatchConfig(correction="mis", cap=1.5)
    outputs = correct_mismatch(torch.zeros(3), torch.ones(3), torch.tensor([3]), config)
    assert outputs.metrics == {"mismatch/masked_fraction": 1, "mismatch/weight_mean": 0}


def test_nan_is_masked_where_the_correction_masks():
    old = torch.tensor([0.0, math.nan])
    for correction in ("mis", "geometric"):
        keep = correct_mismatch(torch.zeros(2), old, torch.tensor([1, 1]), MismatchConfig(correction=correction)).keep
        assert keep.tolist() == [True, False]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        correct_mismatch(torch.zeros(3), torch.zeros(2), torch.tensor([3]), MismatchConfig())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cap": 1.0}, "more than 1"),
        ({"cap": 0.5}, "1 or more"),
        ({"cap": math.inf}, "1 or more"),
        ({"abort_above": -0.1}, "mismatch.abort_above = -0.1 is out of range: it must be 0 or more"),
        ({"correction": "tis_sequenc"}, "did you mean tis_sequence"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said) as caught:
        validate_mismatch(MismatchConfig(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_possible_options_are_accepted(correction):
    validate_mismatch(MismatchConfig(correction=correction, cap=1.01, abort_above=0.5))


@pytest.mark.parametrize(
    ("loss", "mismatch", "needed"),
    [
        ({}, {}, False),
        ({"kind": "ppo", "kl_coefficient": 0.1}, {"abort_above": 1.0}, False),
        ({"kl_in": "reward"}, {}, False),
        ({"kl_in": "reward", "kl_coefficient": 0.1}, {}, True),
        ({"kind": "clip_cov"}, {}, True),
        ({"kind": "kl_cov"}, {}, True),
        *(({}, {"correction": correction}, True) for correction in CORRECTIONS[1:]),
    ],
)
def test_when_old_logprobs_are_needed(loss, mismatch, needed):
    assert needs_old_logprobs(PolicyLossConfig(**loss), MismatchConfig(**mismatch)) is needed


def all_responses(logits: torch.Tensor) -> torch.Tensor:
    """float64 [16, 4]: log-probs of the tokens of every response of four that a policy of two tokens has; each depends
    on the one before."""
    tokens = torch.cartesian_prod(*[torch.arange(2)] * 4)
    before = torch.cat([torch.full((16, 1), 2), tokens[:, :-1]], dim=1)
    return logits.log_softmax(dim=1)[before, tokens]


def expected_gradient(now: torch.Tensor, sampler: torch.Tensor, kind: str, correction: str) -> torch.Tensor:
    """Of the policy loss at `now`, over all responses that `sampler` gives; rewards are made up."""
    advantages = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    parameters = now.clone().requires_grad_()
    logprobs, sampled = all_responses(parameters), all_responses(sampler)
    lengths = torch.full((16,), 4)
    old = logprobs.detach().flatten()
    found = correct_mismatch(sampled.flatten(), old, lengths, MismatchConfig(correction=correction, cap=1e6))
    policy_loss(
        logprobs.flatten(), advantages * sampled.sum(1).exp(), lengths, PolicyLossConfig(kind=kind), 1.0,
        TokenInputs(old, weights=found.weights, keep=found.keep),
    ).loss.backward()  # fmt: skip
    assert parameters.grad is not None
    return parameters.grad


@pytest.mark.parametrize("kind", ["gspo", "ppo"])
def test_only_the_product_of_ratios_makes_older_samples_as_good_as_new_ones(kind):
    """Expected gradients, by enumeration: those of samples of the policy itself, and of one that has moved since."""
    now, sampler = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 0.5
    wanted = expected_gradient(now, now, kind, "none")

    def distance(correction: str) -> float:
        return float((expected_gradient(now, sampler, kind, correction) - wanted).norm() / wanted.norm())

    assert distance("tis_sequence") < 1e-12
    # Token weights know nothing of how likely the rest of the response has become.
    assert 0.5 < distance("tis") < distance("none")
