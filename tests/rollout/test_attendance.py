"""Two ranks wait for each other's work longer than a meeting may take, and what one finds, or why it fails, is known to
all; a server that only one of them sees fail is used by none, and the run says why. HTTP and messages are real, vLLM's
part is played. A rank that is stopped: test_network_push.py, tests/resharding/test_control.py."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_riskpo.rollout.vllm_arguments import request_seeds
from tests.distributed.ranks import run_on_ranks
from tests.rollout import attendance_cases
from tests.rollout.attendance_cases import PHASE, SLOW_S, TIMEOUT_S
from tests.rollout.fake_server import FakeServer, fake_server, token_at
from tests.rollout.served_rank_cases import SAMPLING, SEEDS
from tests.tiny_models import make_tiny_qwen2


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[FakeServer, FakeServer]]:
    """The second one fails for questions of the second rank."""
    with fake_server(delay_s=0.05) as good, fake_server(delay_s=0.05, fails_for={7, 8}) as bad:
        yield good, bad


@pytest.fixture(scope="module")
def ranks(servers: tuple[FakeServer, FakeServer], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each found."""
    folder = tmp_path_factory.mktemp("ranks")
    urls = [server.url for server in servers]
    model = make_tiny_qwen2(folder / "model", tied=True, seed=0)
    (folder / "case.json").write_text(json.dumps({"model": str(model), "servers": [urls, urls[1:]]}))
    return run_on_ranks(f"{attendance_cases.__name__}:{attendance_cases.outcomes.__name__}", 2, folder / "ranks")


@pytest.fixture(scope="module")
def found(ranks: list[Any]) -> list[dict[str, Any]]:
    """Of the ranks' work, apart from servers."""
    return [of for of, _ in ranks]


def test_a_rank_may_wait_for_servers_longer_than_meetings_do(found):
    (first, together), (second, _) = (of["seconds"] for of in found)
    assert second >= SLOW_S
    assert together - first > TIMEOUT_S


def test_what_the_first_rank_finds_all_know_however_long_it_takes(found):
    for of in found:
        assert of["first"] == 7
        assert of["first fails"] == "rank 0 failed"
        assert of["afterwards"] == 0


def test_what_each_rank_finds_all_know(found):
    for of in found:
        assert of["all"] == [0, 1]
        assert of["second fails"] == "rank 1 failed"


def test_a_rank_that_comes_to_meetings_and_is_never_done_is_bounded(found):
    first, second = (of["hangs"] for of in found)
    assert second == f"{PHASE}: ranks [0] are not done after 0.4 s (run.timeout_s)"
    # The second one is not there any more, of which the first hears when it is done.
    assert "for rank 1 (" in first


def test_a_server_that_one_rank_alone_sees_fail_is_named_and_used_by_none(
    ranks: list[Any], servers: tuple[FakeServer, FakeServer]
) -> None:
    good, bad = servers
    (_, (first, _)), (_, (second, _)) = ranks
    assert first["lines"] == [f"rollout server given up: {failure(bad)} (rank 1)"]
    assert second["lines"] == []
    seeds = [seed for of in SEEDS for seed in request_seeds(of, SAMPLING.group_size)]
    expected = [[token_at(seed, position) for position in range(8)] for seed in seeds]
    for rank in (first, second):
        assert rank["tokens"] == expected
        assert rank["usable"] == [good.url]


def test_where_one_rank_alone_has_no_server_left_all_say_why(
    ranks: list[Any], servers: tuple[FakeServer, FakeServer]
) -> None:
    _, bad = servers
    (_, (_, first)), (_, (_, second)) = ranks
    # It takes the weights again, and fails again.
    assert first["lines"] == [f"rollout server given up: {failure(bad)} (rank 1)"] * 2
    for rank in (first, second):
        assert rank["usable"] == []
        assert rank["error"].startswith("8 responses could not be sampled, with 1 restarts of the servers (")
        assert failure(bad) in rank["error"]


def failure(server: FakeServer) -> str:
    return f"{server.url}/inference/v1/generate answered 500: made to fail"
