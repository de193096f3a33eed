"""Real `riskpo serve` processes (vLLM on the CPU) against transformers and the in-process engine.

One server, started once, serves most tests. Not tested here: several machines, a GPU.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_riskpo.rollout.server_engine import ServerEngine
from megatron_riskpo.rollout.types import SamplingConfig
from tests.server_runs import exporter, running_server, server_config, server_engine, with_urls
from tests.tiny_models import hf_token_logprobs, load_hf, make_tiny_qwen2
from tests.vllm_engines import max_difference, single_rank, vllm_engine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [20], [5, 6, 7]]
SEEDS = [3, 1, 2, 2**63 - 1]
SAMPLING = SamplingConfig(group_size=4, max_response_tokens=24, temperature=0.7, stop_token_ids=(1, 2, 3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny_qwen2(folder / name, tied=True, seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def url(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with running_server(server_config(models["a"]), folder) as process:
        yield process.wait()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def engine(url: str, models: dict[str, Path], tmp_path: Path, lines: list[str]) -> Iterator[ServerEngine]:
    config = with_urls(server_config(models["a"]), url)
    with single_rank(), server_engine(config, tmp_path, exporter(models["a"]), lines) as engine:
        yield engine


def test_after_each_push_the_server_is_the_pushed_model(engine, models):
    for version, name in enumerate("aba"):
        engine.update_weights(exporter(models[name])(), version)
        assert engine.weight_version == version
        model = load_hf(models[name])
        rollouts = engine.generate(PROMPTS, SAMPLING, SEEDS)
        assert max_difference(rollouts, model, SAMPLING.temperature) <= 1e-5
        assert rollouts.weight_versions.tolist() == [version] * rollouts.rollout_logprobs.numel()
        sequences = [sequence.tolist() for sequence in rollouts.sequences()][:3]
        for sequence, logprobs in zip(sequences, engine.token_logprobs(sequences), strict=True):
            torch.testing.assert_close(logprobs, hf_token_logprobs(model, sequence), atol=1e-5, rtol=0)


def test_samples_are_those_of_the_engine_in_process(engine, models):
    engine.update_weights(exporter(models["b"])(), 1)
    served = engine.generate(PROMPTS, SAMPLING, SEEDS)
    with vllm_engine(models["b"]) as in_process:
        expected = in_process.generate(PROMPTS, SAMPLING, SEEDS)
    assert torch.equal(served.tokens, expected.tokens)
    assert torch.equal(served.finished, expected.finished)
    torch.testing.assert_close(served.rollout_logprobs, expected.rollout_logprobs, atol=1e-5, rtol=0)
    assert 0 < served.finished.sum() < served.num_sequences


def test_responses_under_way_go_on_with_the_new_weights(engine, models):
    """Each token's log-prob is that of the model of its version, given all tokens before it."""
    engine.update_weights(exporter(models["a"])(), 0)
    sampling = SamplingConfig(group_size=32, max_response_tokens=40, temperature=1.0, stop_token_ids=())
    pending = engine.submit(PROMPTS, sampling, SEEDS)
    while not any(response.tokens for response in pending.responses):
        engine.update_weights(exporter(models["b"])(), engine.weight_version + 1)
    rollouts = engine.collect(pending)
    assert rollouts.response_lengths.tolist() == [40] * 128
    versions = rollouts.split_by_response(rollouts.weight_versions)
    assert any(0 in of.tolist() and max(of.tolist()) > 0 for of in versions)
    assert all(torch.equal(of, of.sort().values) for of in versions)
    scores = {name: load_hf(models[name]) for name in "ab"}
    logprobs = rollouts.split_by_response(rollouts.rollout_logprobs)
    for sequence, prompt, own, of in zip(
        rollouts.sequences(), rollouts.prompt_lengths, logprobs, versions, strict=True
    ):
        by_version = [hf_token_logprobs(scores[name], sequence.tolist())[prompt - 1 :] for name in "ab"]
        expected = torch.where(of == 0, *by_version)
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)
