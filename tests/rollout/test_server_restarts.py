"""Servers given by address that crash and are back, started anew by somebody else, before any health check has noticed:
the run goes on, and no response is lost. HTTP, collectives and files are real, vLLM's part is played."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_riskpo.rollout.server_engine import ServerEngine
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig
from megatron_riskpo.rollout.vllm_arguments import request_seeds
from tests.rollout.fake_server import FakeServer, fake_server, token_at
from tests.rollout.shard_server import ShardServer
from tests.server_runs import exporter, server_config, server_engine, shards_of, with_urls
from tests.tiny_models import make_tiny_qwen2
from tests.vllm_engines import single_rank

PROMPTS, SEEDS = [[5, 6, 7], [9, 10]], [3, 1]
SAMPLING = SamplingConfig(group_size=2, max_response_tokens=8, temperature=1.0, stop_token_ids=(1,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2(tmp_path_factory.mktemp("models") / "a", tied=True, seed=0)


@pytest.fixture(params=["file", "network", "shared_memory"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server(transport: str, tmp_path: Path) -> Iterator[FakeServer]:
    """The only one."""
    played = ShardServer(tmp_path, {}, tp=1) if transport == "network" else FakeServer()
    with fake_server(played) as server:
        if isinstance(server, ShardServer):
            server.compares = False
        yield server


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def engine(server: FakeServer, transport: str, model: Path, tmp_path: Path, lines: list[str]) -> Iterator[ServerEngine]:
    """Whose health checks notice nothing: the servers' absence is shorter."""
    options = {"transport": transport, "health_timeout_s": 60.0}
    config = with_urls(server_config(model, server=options), server.url)
    shards = shards_of(model)
    with single_rank(), server_engine(config, tmp_path, exporter(model), lines, shards) as engine:
        yield engine


def assert_complete(rollouts: Rollouts, version: int) -> None:
    seeds = [seed for of in SEEDS for seed in request_seeds(of, SAMPLING.group_size)]
    expected = [[token_at(seed, position) for position in range(8)] for seed in seeds]
    assert [response.tolist() for response in rollouts.responses()] == expected
    assert rollouts.weight_versions.tolist() == [version] * 32


def test_a_server_started_anew_before_a_push_gets_its_weights(engine, server, model, lines):
    engine.update_weights(exporter(model)(), 0)
    assert_complete(engine.generate(PROMPTS, SAMPLING, SEEDS), 0)
    server.restart()
    engine.update_weights(exporter(model)(), 1)
    assert server.version == "1"
    assert_complete(engine.generate(PROMPTS, SAMPLING, SEEDS), 1)
    (line,) = lines
    assert f"{server.url} has weights 'default', not '0' as it was given: it was started anew" in line


def test_a_server_started_anew_after_a_push_gets_its_weights_again(engine, server, model, lines):
    engine.update_weights(exporter(model)(), 0)
    server.restart()
    assert_complete(engine.generate(PROMPTS, SAMPLING, SEEDS), 0)
    assert server.version == "0"
    (line,) = lines
    assert f"{server.url} sampled with weights of version -1, not 0" in line


def test_requests_under_way_on_a_server_started_anew_are_sampled_by_the_new_weights(engine, server, model):
    engine.update_weights(exporter(model)(), 0)
    server.delay_s = 0.3
    pending = engine.submit(PROMPTS, SAMPLING, SEEDS)
    while not server.requests:
        time.sleep(0.01)
    server.restart()
    engine.update_weights(exporter(model)(), 1)
    assert_complete(engine.collect(pending), 1)
