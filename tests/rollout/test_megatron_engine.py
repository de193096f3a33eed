"""The built-in sampler against transformers (greedy without a cache, teacher-forced log-probs, distribution), and
against itself: the same samples whatever the batch and the layout."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.actor.actor import supervised_loss
from megatron_riskpo.config import ActorConfig
from megatron_riskpo.errors import UsageError
from megatron_riskpo.rollout.cached_decoder import CachedDecoder
from megatron_riskpo.rollout.megatron_engine import plan_batches
from megatron_riskpo.rollout.sampling import choose_tokens, response_uniforms
from megatron_riskpo.rollout.types import SamplingConfig
from tests.distributed.ranks import run_on_ranks
from tests.rollout.megatron_engine_cases import LAYOUTS, PROMPTS, SAMPLING, SEEDS, build_actor, build_engine, run
from tests.tiny_models import hf_token_logprobs, load_hf, make_tiny_qwen2

VOCAB_SIZE = 97
GREEDY = SamplingConfig(group_size=1, max_response_tokens=12, temperature=0.0, stop_token_ids=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    for tied in ("tied", "untied"):
        # 97 entries: tensor parallelism has to pad the vocabulary.
        make_tiny_qwen2(folder / tied, tied=tied == "tied", seed=5, vocab_size=VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def actor(folder):
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_actor(folder / "untied", ActorConfig())
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def hf(folder):
    return load_hf(folder / "untied")


def assert_same_samples(a, b):
    for name in ("tokens", "prompt_lengths", "response_lengths", "finished"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.rollout_logprobs, b.rollout_logprobs, rtol=0, atol=1e-5)


def teacher_forced(hf, rollouts, temperature):
    pairs = zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), strict=True)
    return torch.cat([hf_token_logprobs(hf, s, temperature)[p - 1 :] for s, p in pairs])


@torch.no_grad()
def hf_greedy(hf, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(hf(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_transformers_without_cache(actor, hf):
    rollouts = build_engine(actor).generate(PROMPTS, GREEDY, SEEDS)
    assert [r.tolist() for r in rollouts.responses()] == [hf_greedy(hf, p, 12) for p in PROMPTS]
    torch.testing.assert_close(rollouts.rollout_logprobs, teacher_forced(hf, rollouts, 1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_teacher_forced(actor, hf, temperature):
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    rollouts = build_engine(actor).generate(PROMPTS, sampling, SEEDS)
    expected = teacher_forced(hf, rollouts, temperature)
    torch.testing.assert_close(rollouts.rollout_logprobs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollouts.rollout_logprobs, actor.logprobs(rollouts, temperature), rtol=0, atol=1e-5)


def test_first_token_follows_the_softmax(actor, hf):
    num_samples, temperature = 4000, 1.5
    sampling = SamplingConfig(num_samples, 1, temperature, ())
    rollouts = build_engine(actor, max_num_seqs=num_samples).generate(PROMPTS[:1], sampling, [123])
    observed = np.bincount(torch.cat(rollouts.responses()), minlength=VOCAB_SIZE)
    with torch.no_grad():
        logits = hf(torch.tensor(PROMPTS[:1])).logits[0, -1]
    expected = (logits / temperature).softmax(-1).numpy() * num_samples
    # Tokens too rare for a bin of their own share one.
    bins = np.where(expected >= 5, np.arange(VOCAB_SIZE), VOCAB_SIZE)
    observed, expected = (np.bincount(bins, weights=counts) for counts in (observed, expected))
    used = expected > 0
    freedom = int(used.sum()) - 1
    chi_square = float(((observed[used] - expected[used]) ** 2 / expected[used]).sum())
    # Mean and standard deviation of chi-square are freedom and sqrt(2 freedom); the seed is fixed.
    assert freedom > 10
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_samples_do_not_depend_on_the_batch(actor):
    engine = build_engine(actor)
    whole = engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert_same_samples(engine.generate(PROMPTS, SAMPLING, SEEDS), whole)
    # 3 is less than a group, so groups are cut too.
    assert_same_samples(build_engine(actor, max_num_seqs=3).generate(PROMPTS, SAMPLING, SEEDS), whole)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        group = range(i * SAMPLING.group_size, (i + 1) * SAMPLING.group_size)
        assert_same_samples(engine.generate([prompt], SAMPLING, [seed]), whole.select(group))


def test_seeds_and_group_members_differ(actor):
    sampling = SamplingConfig(4, 10, 2.0, ())
    rollouts = build_engine(actor).generate([PROMPTS[0]] * 2, sampling, [0, 1])
    assert len({tuple(r.tolist()) for r in rollouts.responses()}) == 8


def test_response_ends_with_its_first_stop_token(actor):
    free = build_engine(actor).generate(PROMPTS, dataclasses.replace(SAMPLING, stop_token_ids=()), SEEDS)
    assert free.response_lengths.tolist() == [10] * 12
    assert not free.finished.any()
    stopped = build_engine(actor).generate(PROMPTS, SAMPLING, SEEDS)
    stop_ids = set(SAMPLING.stop_token_ids)
    for i, (response, whole) in enumerate(zip(stopped.responses(), free.responses(), strict=True)):
        stops = [position for position, token in enumerate(whole.tolist()) if token in stop_ids]
        assert response.tolist() == whole[: stops[0] + 1 if stops else None].tolist()
        assert bool(stopped.finished[i]) == bool(stops)
    assert 0 < int(stopped.finished.sum()) < 12, "the case should have both kinds"


def test_update_weights_only_notes_the_version(actor):
    engine = build_engine(actor)
    assert engine.weight_version == -1
    engine.update_weights(iter(()), version=3)
    assert engine.weight_version == 3
    assert engine.shares_weights


def test_responses_are_told_of_while_others_are_decoded(actor, monkeypatch):
    num_steps = 0
    step = CachedDecoder.step

    def counted(self: CachedDecoder, tokens: torch.Tensor) -> torch.Tensor | None:
        nonlocal num_steps
        num_steps += 1
        return step(self, tokens)

    monkeypatch.setattr(CachedDecoder, "step", counted)
    told: dict[int, tuple[int, list[int]]] = {}
    sampling = dataclasses.replace(SAMPLING, group_size=12)
    rollouts = build_engine(actor).generate(
        PROMPTS[:1], sampling, SEEDS[:1], lambda row, tokens: told.setdefault(row, (num_steps, list(tokens)))
    )
    responses = [response.tolist() for response in rollouts.responses()]
    # One batch, whose prompt is taken in one step: token n comes with step n.
    assert told == {row: (len(response), response) for row, response in enumerate(responses)}
    assert len({len(response) for response in responses}) > 2


def test_no_prompts(actor):
    rollouts = build_engine(actor).generate([], SAMPLING, [])
    assert rollouts.num_sequences == 0
    assert rollouts.tokens.numel() == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt 1 has 0 tokens"), ([1] * 119, "1 to 118 to fit the engine's 128"), ([VOCAB_SIZE], "outside 0..96")],
)
def test_wrong_prompts_are_refused(actor, prompt, message):
    with pytest.raises(UsageError, match=message):
        build_engine(actor).generate([[1], prompt], SAMPLING, [0, 1])


def test_training_goes_on_after_sampling(actor):
    """Sampling leaves the module trainable, and the next call sees the optimizer step. The weights are restored."""
    engine = build_engine(actor)
    kept = {n: p.detach().clone() for n, p in actor.chunks[0].named_parameters()}
    before = engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert actor.chunks[0].training
    actor.train_step(before, supervised_loss(before), SAMPLING.temperature, 10)
    after = engine.generate(PROMPTS, SAMPLING, SEEDS)
    torch.testing.assert_close(after.rollout_logprobs, actor.logprobs(after, SAMPLING.temperature), rtol=0, atol=1e-5)
    assert not torch.equal(before.rollout_logprobs, after.rollout_logprobs)
    with torch.no_grad():
        for name, parameter in actor.chunks[0].named_parameters():
            parameter.copy_(kept[name])
    assert_same_samples(engine.generate(PROMPTS, SAMPLING, SEEDS), before)


def test_zero_probability_is_never_chosen():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniforms = torch.tensor([0.0, 0.5 - 2**-30, 0.5, 1 - 2**-53], dtype=torch.float64)
    ids, logprobs = choose_tokens(logits, uniforms, 1.0)
    assert ids.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(logprobs, torch.full((4,), 0.5).log())


def test_uniforms_are_streams_of_their_own():
    few, many = response_uniforms([4, 5], 2, 8), response_uniforms([4, 5], 3, 16)
    assert np.array_equal(few, many[[0, 1, 3, 4], :8])
    assert len(np.unique(many)) == many.size


def test_plan_batches_bounds_rows_and_spread():
    lengths = [9, 1, 4, 5, 30, 2, 2, 31]
    batches = plan_batches(lengths, max_num_seqs=3, max_spread=5)
    assert sorted(row for rows in batches for row in rows) == list(range(8))
    assert batches == [[1, 5, 6], [2, 3, 0], [4, 7]]


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run_on_ranks(f"{run.__module__}:{run.__name__}", 2, folder / "two")


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_samples_do_not_depend_on_the_layout(actor, folder, two_ranks, layout, tied):
    single = actor if tied == "untied" else build_actor(folder / "tied", ActorConfig())
    reference = build_engine(single).generate(PROMPTS, SAMPLING, SEEDS)
    for rank_results in two_ranks:
        rollouts, actor_logprobs, _ = rank_results[layout, tied]
        assert_same_samples(rollouts, reference)
        assert int(rollouts.tokens.max()) < VOCAB_SIZE
        torch.testing.assert_close(rollouts.rollout_logprobs, actor_logprobs, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_each_response_is_told_of_on_one_rank(two_ranks, layout):
    (rollouts, _, first), (_, _, second) = (rank_results[layout, "tied"] for rank_results in two_ranks)
    assert first.keys().isdisjoint(second)
    assert first | second == {row: response.tolist() for row, response in enumerate(rollouts.responses())}
    assert len(first) == len(second) or layout == "dp2"
