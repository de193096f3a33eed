"""Real vLLM on tiny random models against transformers. Not tested here: a GPU, models other than Qwen2."""

import importlib.util
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.config import RolloutConfig
from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig
from megatron_riskpo.rollout.vllm_arguments import request_seeds
from megatron_riskpo.rollout.vllm_engine import VllmEngine
from megatron_riskpo.rollout.vllm_environment import import_vllm, prepare_environment
from tests.distributed.ranks import run_on_ranks
from tests.rollout import vllm_ranks
from tests.tiny_models import hf_token_logprobs, load_hf, make_tiny_qwen2
from tests.vllm_engines import max_difference, single_rank, vllm_engine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [20], [5, 6, 7]]
SEEDS = [3, 1, 2, 2**63 - 1]
STOP_TOKENS = (1, 2, 3)


def sampling(temperature: float = 1.0, group_size: int = 4, max_response_tokens: int = 24) -> SamplingConfig:
    return SamplingConfig(group_size, max_response_tokens, temperature, STOP_TOKENS)


def same_bits(a: Rollouts, b: Rollouts) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


@pytest.fixture(scope="module", autouse=True)
def _default_group() -> Iterator[None]:
    with single_rank():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Checkpoint folders, by whether the embeddings are tied."""
    folder = tmp_path_factory.mktemp("models")
    return {tied: make_tiny_qwen2(folder / f"tied_{tied}", tied=tied, seed=0) for tied in (True, False)}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def engine_and_model(
    request: pytest.FixtureRequest, models: dict[bool, Path]
) -> Iterator[tuple[VllmEngine, torch.nn.Module]]:
    with vllm_engine(models[request.param]) as engine:
        yield engine, load_hf(models[request.param])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_transformers(engine_and_model, temperature):
    engine, model = engine_and_model
    rollouts = engine.generate(PROMPTS, sampling(temperature), SEEDS)
    assert max_difference(rollouts, model, temperature) <= 1e-5


def test_greedy_takes_the_argmax(engine_and_model):
    engine, model = engine_and_model
    rollouts = engine.generate(PROMPTS, sampling(0.0, group_size=1), SEEDS)
    for sequence, prompt in zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), strict=True):
        with torch.no_grad():
            best = model(sequence[None]).logits[0].argmax(-1)
        assert torch.equal(best[prompt - 1 : -1], sequence[prompt:])


def test_teacher_forced_logprobs_are_those_of_transformers(engine_and_model):
    engine, model = engine_and_model
    sequences = [list(range(4, 60)), [7, 7], [50, 2, 1, 9]]
    for sequence, logprobs in zip(sequences, engine.token_logprobs(sequences), strict=True):
        torch.testing.assert_close(logprobs, hf_token_logprobs(model, sequence), atol=1e-5, rtol=0)


def test_a_response_ends_with_its_first_stop_token_or_at_the_limit(engine_and_model):
    engine, _ = engine_and_model
    rollouts = engine.generate(PROMPTS, sampling(), SEEDS)
    assert 0 < rollouts.finished.sum() < rollouts.num_sequences
    for i, (response, finished) in enumerate(zip(rollouts.responses(), rollouts.finished.tolist(), strict=True)):
        stops = [position for position, token in enumerate(response.tolist()) if token in STOP_TOKENS]
        assert stops == ([len(response) - 1] if finished else [])
        assert finished or len(response) == 24
        assert rollouts.sequences()[i][: -len(response)].tolist() == PROMPTS[i // 4]


def test_each_response_is_told_of_once_while_others_are_sampled(engine_and_model):
    engine, _ = engine_and_model
    expected = engine.generate(PROMPTS, sampling(), SEEDS)
    told: dict[int, list[int]] = {}
    num_left: list[int] = []

    def note(row: int, tokens: Sequence[int]) -> None:
        assert row not in told
        told[row] = list(tokens)
        num_left.append(engine._llm.llm_engine.get_num_unfinished_requests())

    assert same_bits(engine.generate(PROMPTS, sampling(), SEEDS, note), expected)
    assert [told[row] for row in range(16)] == [response.tolist() for response in expected.responses()]
    order = sorted(range(16), key=list(told).index)
    lengths = expected.response_lengths[order].tolist()
    assert lengths == sorted(lengths), "as they finished, all having begun together"
    assert num_left[0] > 0


def test_samples_follow_the_softmax(engine_and_model):
    engine, model = engine_and_model
    num_samples, temperature = 2000, 0.7
    rollouts = engine.generate([[5, 6, 7]], sampling(temperature, num_samples, max_response_tokens=1), [0])
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(torch.cat(rollouts.responses()), minlength=expected.numel())
    standard_error = (expected * (1 - expected) / num_samples).sqrt()
    # 5 standard errors, and one count for tokens that are hardly ever drawn
    assert ((counts / num_samples - expected).abs() <= 5 * standard_error + 1 / num_samples).all()


def test_a_call_depends_on_weights_prompts_and_seeds_only(engine_and_model):
    engine, _ = engine_and_model
    first = engine.generate(PROMPTS, sampling(), SEEDS)
    torch.manual_seed(99)
    engine.generate([list(range(4, 30))], sampling(0.5), [7])
    assert same_bits(first, engine.generate(PROMPTS, sampling(), SEEDS))
    assert not torch.equal(first.tokens, engine.generate(PROMPTS, sampling(), [4, 5, 6, 7]).tokens)


def test_a_fresh_engine_gives_the_same_bits_and_leaves_the_process_as_it_was(models):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    set_num_threads, num_threads, preload = torch.set_num_threads, torch.get_num_threads(), os.environ.get("LD_PRELOAD")
    batches = []
    for seed in (0, 1):  # the engine's own seed must not matter
        with vllm_engine(models[True], seed=seed) as engine:
            batches.append(engine.generate(PROMPTS, sampling(), SEEDS))
        total = torch.ones(1)
        dist.all_reduce(total)  # the default group outlives the engine
    assert same_bits(*batches)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert (torch.set_num_threads, torch.get_num_threads()) == (set_num_threads, num_threads)
    assert os.environ.get("LD_PRELOAD") == preload
    with pytest.raises(RunError, match="closed"):
        engine.generate(PROMPTS, sampling(), SEEDS)


def test_experts_of_other_ranks_are_left_to_them():
    """What vLLM's CPU kernel is given; what it makes of it: resharding/test_in_process.py."""
    from megatron_riskpo.rollout.vllm_cpu_worker import _with_own_experts

    given: dict[str, Any] = {}
    apply = _with_own_experts(lambda experts, **arguments: given.update(arguments))
    ids, weights = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    arguments = {"topk_ids": ids, "topk_weights": weights, "apply_router_weight_on_input": False, "output": "there"}
    apply(None, expert_map=torch.tensor([-1, -1, 0, 1], dtype=torch.int32), **arguments)
    assert given["topk_ids"].dtype == torch.int32  # which the kernel reads without asking
    assert given["topk_weights"].tolist() == [[weights[0, 0], 0], [0, weights[1, 1]]]
    assert (given["topk_ids"][0, 0], given["topk_ids"][1, 1], given["output"]) == (0, 1, "there")
    apply(None, expert_map=None, **arguments)
    assert given["topk_ids"] is ids
    assert given["topk_weights"] is weights
    with pytest.raises(NotImplementedError, match="on the experts' input"):
        apply(None, expert_map=ids[0], **arguments | {"apply_router_weight_on_input": True})


def test_neighbouring_seeds_share_no_request_seed():
    seeds = [seed for prompt_seed in range(100) for seed in request_seeds(prompt_seed, 8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "0 tokens"), ([5] * 41, "41 tokens.* 1 to 40"), ([96], "0..95"), ([-1], "0..95")]
)
def test_a_prompt_that_does_not_fit_is_refused(engine_and_model, prompt, message):
    engine, _ = engine_and_model
    with pytest.raises(UsageError, match=message):
        engine.generate([[5], prompt], sampling(), [0, 1])


def test_settings_that_cannot_work_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"rollout.tp = 2 does not divide the 1 ranks"):
        VllmEngine(
            tmp_path, RolloutConfig(tp=2), dtype="float32", max_model_len=64, world_group=dist.group.WORLD, seed=0
        )
    small_heads = make_tiny_qwen2(tmp_path / "small_heads", tied=True, seed=0, hidden_size=64)
    with pytest.raises(UsageError, match="head dimension is 16"), vllm_engine(small_heads):
        pass
    with pytest.raises(UsageError, match=r"'max_model_len': 1000.*512"), vllm_engine(small_heads, max_model_len=1000):
        pass
    assert dist.is_initialized()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UsageError, match="unset it"):
        prepare_environment(rank=0)


def test_without_vllm_the_error_names_both_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"make install.*rollout.engine = \"megatron\""):
        import_vllm()


@pytest.mark.slow
def test_two_ranks_as_two_engines_and_as_one(tmp_path):
    models = {name: load_hf(make_tiny_qwen2(tmp_path / name, tied=True, seed=seed)) for seed, name in enumerate("ab")}
    first, second = run_on_ranks("tests.rollout.vllm_ranks:run", 2, tmp_path)
    for tp in (1, 2):
        for name in ("a", "b", "one_prompt"):
            assert same_bits(first[tp][name], second[tp][name])
        for name, model in models.items():
            assert max_difference(first[tp][name], model, vllm_ranks.SAMPLING.temperature) <= 1e-5
        for rank in (first, second):
            assert rank[tp]["sum_after_close"] == 2
            assert not rank[tp]["left_in_memory"]
            assert sum(len(one[tp]["told"]) for one in (first, second)) == first[tp]["b"].num_sequences
            for row, tokens in rank[tp]["told"].items():
                assert tokens == rank[tp]["b"].responses()[row].tolist()
            for sequence, scores in zip(rank[tp]["b"].sequences(), rank[tp]["scores"], strict=True):
                torch.testing.assert_close(scores, hf_token_logprobs(models["b"], sequence.tolist()), atol=1e-5, rtol=0)
    # Samples do not depend on how the ranks are split into engines, nor on the other prompts.
    assert torch.equal(first[1]["b"].tokens, first[2]["b"].tokens)
    assert torch.equal(first[1]["one_prompt"].tokens, first[1]["b"].select(range(4)).tokens)
