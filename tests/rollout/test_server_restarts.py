"""Servers given by address that crash and are back, started anew by somebody else, before any health check has noticed;
and the run's own that die while nobody asks them for anything: the run goes on, and no response is lost. HTTP,
collectives and files are real, vLLM's part is played."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.rollout import server_engine as server_engine_module
from megatron_riskpo.rollout.server_engine import ServerEngine
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig
from megatron_riskpo.rollout.vllm_arguments import request_seeds
from tests.rollout.fake_server import FakeServer, fake_server, token_at
from tests.rollout.shard_server import ShardServer
from tests.rollout.test_server_fleet import Process
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
    assert server.version.endswith("-1")
    assert_complete(engine.generate(PROMPTS, SAMPLING, SEEDS), 1)
    (line,) = lines
    assert re.search(rf"{server.url} has weights 'default', not '\w+-0' as it was given: it was started anew", line)


def test_a_server_started_anew_after_a_push_gets_its_weights_again(engine, server, model, lines):
    engine.update_weights(exporter(model)(), 0)
    server.restart()
    assert_complete(engine.generate(PROMPTS, SAMPLING, SEEDS), 0)
    assert server.version.endswith("-0")
    (line,) = lines
    assert f"{server.url} sampled with weights 'default', not of version 0: it was started anew" in line


def test_requests_under_way_on_a_server_started_anew_are_sampled_by_the_new_weights(engine, server, model):
    engine.update_weights(exporter(model)(), 0)
    server.delay_s = 0.3
    pending = engine.submit(PROMPTS, SAMPLING, SEEDS)
    while not server.requests:
        time.sleep(0.01)
    server.restart()
    engine.update_weights(exporter(model)(), 1)
    assert_complete(engine.collect(pending), 1)


class OwnServer(Process):
    """A process of the run's: started anew it is healthy, at the same address."""

    def __init__(self, index: int, config: TrainConfig, server: FakeServer) -> None:
        super().__init__(index, restarts_left=3)
        self.config, self.server = config, server  # type: ignore[assignment]

    def url(self) -> str:
        return self.server.url

    def restart(self) -> bool:
        self.server.restart()
        self.server.health_status = 200
        return super().restart()


@pytest.mark.parametrize("num_servers", [1, 2])
def test_an_own_server_that_dies_between_two_pushes_is_started_again(model, tmp_path, monkeypatch, lines, num_servers):
    config = server_config(model, server={"transport": "file", "health_timeout_s": 0.5})
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(fake_server(FakeServer())) for _ in range(num_servers)]
        processes = [OwnServer(index, config, server) for index, server in enumerate(servers)]
        monkeypatch.setattr(server_engine_module, "server_processes", lambda *arguments: processes)
        stack.enter_context(single_rank())
        engine = stack.enter_context(server_engine(config, tmp_path, exporter(model), lines))
        engine.update_weights(exporter(model)(), 0)
        servers[0].health_status = 500
        deadline = time.monotonic() + 30
        while len(engine._pool.usable) == num_servers:  # until a health check has noticed
            assert time.monotonic() < deadline
            time.sleep(0.05)
        engine.update_weights(exporter(model)(), 1)
        assert [process.num_starts for process in processes] == [2, *[1] * (num_servers - 1)]
        engine.update_weights(exporter(model)(), 2)  # by now it is back
        assert all(server.version.endswith("-2") for server in servers)
        assert_complete(engine.generate(PROMPTS, SAMPLING, SEEDS), 2)
    assert lines[-2:] == [
        f"rollout server given up: {servers[0].url} cannot take weights",
        "rollout server 0 is started again (2 more times at most)",
    ]
