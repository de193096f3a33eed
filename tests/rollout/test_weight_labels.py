"""Runs that push to one server, by mistake or one after the other. HTTP is real, vLLM's part is played."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.server_engine import ServerEngine
from megatron_riskpo.rollout.types import SamplingConfig
from megatron_riskpo.rollout.weight_labels import SERVERS_OWN, WeightLabels, is_half_updated, new_run
from tests.rollout.fake_server import LABELS, fake_server
from tests.rollout.test_server_push import push
from tests.server_runs import exporter, server_config, server_engine, with_urls
from tests.tiny_models import make_tiny_qwen2
from tests.vllm_engines import single_rank

PROMPTS, SEEDS = [[5, 6, 7], [9, 10]], [3, 1]
SAMPLING = SamplingConfig(group_size=4, max_response_tokens=8, temperature=1.0, stop_token_ids=(1,))
OTHERS = WeightLabels("4567cdef")
ANOTHER_RUN = "another run pushes to it; give each run servers of its own, or end the other run"

Run = Callable[..., AbstractContextManager[ServerEngine]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run on servers; of each version it pushes the same weights."""
    model = make_tiny_qwen2(tmp_path / "model", tied=True, seed=0)

    @contextlib.contextmanager
    def started(*urls: str, lines: list[str] | None = None) -> Iterator[ServerEngine]:
        config = with_urls(server_config(model, server={"transport": "file"}), *urls)
        with server_engine(config, tmp_path, exporter(model), lines) as engine:
            yield engine

    with single_rank():
        yield started


def test_only_this_runs_complete_weights_have_a_version() -> None:
    assert [LABELS.version(label) for label in (LABELS.of(12), SERVERS_OWN)] == [12, -1]
    strange = [OTHERS.of(12), LABELS.towards(12), "12", "-12", "", "None", "0123abcd-", "0123abcd-x"]
    assert [LABELS.version(label) for label in strange] == [-2] * 8
    assert [LABELS.is_of_another_run(label) for label in (OTHERS.of(1), OTHERS.towards(1))] == [True, True]
    ours = [LABELS.of(1), LABELS.towards(1), SERVERS_OWN, "12"]
    assert not any(LABELS.is_of_another_run(label) for label in ours)
    assert all(map(is_half_updated, (LABELS.towards(1), OTHERS.towards(1), "towards-1")))
    assert not is_half_updated(LABELS.of(1))
    names = {new_run() for _ in range(100)}
    assert len(names) == 100
    assert all(OTHERS.is_of_another_run(WeightLabels(name).of(0)) for name in names)


def test_of_two_runs_on_one_server_the_one_whose_weights_were_replaced_ends(run: Run) -> None:
    """Although both count their steps alike; the other one goes on undisturbed."""
    with fake_server(version=SERVERS_OWN) as server, run(server.url) as first, run(server.url) as second:
        push_to(first, 7)
        push_to(second, 7)
        with pytest.raises(RunError, match=rf"no rollout server is left: {server.url} sampled with .*: {ANOTHER_RUN}"):
            first.generate(PROMPTS, SAMPLING, SEEDS)
        with pytest.raises(RunError, match=ANOTHER_RUN):
            push_to(first, 8)
        calls = len(server.calls)
        rollouts = second.generate(PROMPTS, SAMPLING, SEEDS)
        assert rollouts.weight_versions is not None
        assert rollouts.weight_versions.tolist() == [7] * 64
        push_to(second, 8)
        assert server.calls[calls:].count("/pause") == 1


def push_to(engine: ServerEngine, version: int) -> None:
    engine.update_weights(engine._export(), version)


def test_a_server_that_another_run_takes_is_left_to_it_and_the_others_do_its_work(run: Run) -> None:
    lines: list[str] = []
    with (
        fake_server(version=SERVERS_OWN) as shared,
        fake_server(version=SERVERS_OWN) as own,
        run(shared.url, own.url, lines=lines) as first,
        run(shared.url) as second,
    ):
        push_to(first, 0)
        push_to(second, 0)
        label = shared.version
        for version in range(1, 3):
            push_to(first, version)
            assert first.generate(PROMPTS, SAMPLING, SEEDS).num_sequences == 8
            assert shared.version == label
        (line,) = lines
        assert f"{shared.url} has weights {label!r}, not " in line
        assert line.endswith(ANOTHER_RUN)
        shared.restart()  # nobody's any more
        push_to(first, 3)
        assert len(first._pool.usable) == 2


def test_a_resumed_run_takes_the_servers_of_its_dead_predecessor(run: Run) -> None:
    with fake_server(version=OTHERS.of(7)) as server, run(server.url) as engine:
        push_to(engine, 6)
        rollouts = engine.generate(PROMPTS, SAMPLING, SEEDS)
        assert rollouts.weight_versions is not None
        assert rollouts.weight_versions.tolist() == [6] * 64


def test_a_server_in_which_another_runs_push_broke_off_is_refused(run: Run) -> None:
    message = r"a push broke off, or is under way, in .* \(weights 'towards-4567cdef-7'\); start servers anew"
    with (
        fake_server(version=OTHERS.towards(7)) as server,
        pytest.raises(RunError, match=message),
        run(server.url),
    ):
        pass


def test_a_push_in_which_another_run_begins_one_is_not_finished(tmp_path: Path) -> None:
    """They may have a mixture of both."""
    with fake_server() as good, fake_server() as bad:

        async def interrupted() -> dict[str, str]:
            pushing = asyncio.ensure_future(push([good, bad], tmp_path))
            while "/update_weights" not in bad.calls:
                await asyncio.sleep(0.001)
            bad.version = OTHERS.towards(3)
            return (await pushing).failed

        bad.call_delay_s = 0.05
        failed = asyncio.run(interrupted())
        assert list(failed) == [bad.url]
        assert f"has weights 'towards-4567cdef-3', not 'towards-0123abcd-3': {ANOTHER_RUN}" in failed[bad.url]
        assert "/finish_weight_update" not in bad.calls
