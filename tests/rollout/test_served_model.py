"""Servers that are asked and never changed, with servers made for it.

Second way to a response: the fake's tokens are a function of seed and position. A real server:
evaluation/test_end_to_end.py.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_riskpo.config import ServerConfig
from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.rollout.served_model import ServedModel
from megatron_riskpo.rollout.types import SamplingConfig
from megatron_riskpo.rollout.vllm_arguments import request_seeds
from tests.rollout.fake_server import LABELS, VOCAB_SIZE, FakeServer, fake_server, token_at
from tests.vllm_engines import single_rank

PROMPTS, SEEDS = [[5, 6], [7], [8, 9, 10]], [4, 5, 6]
SAMPLING = SamplingConfig(group_size=2, max_response_tokens=5, temperature=1.0, stop_token_ids=(1,))


@pytest.fixture(scope="module", autouse=True)
def _default_group() -> Iterator[None]:
    with single_rank():
        yield


@contextlib.contextmanager
def served(
    servers: Sequence[FakeServer], lines: list[str] | None = None, model: str = "model", **options
) -> Iterator[ServedModel]:
    said = [] if lines is None else lines
    engine = ServedModel(
        Path(model), [server.url for server in servers], ServerConfig(**({"health_timeout_s": 1.0} | options)),
        max_model_len=32, vocab_size=VOCAB_SIZE, world_group=dist.group.WORLD, timeout_s=60,  # type: ignore[arg-type]
        log=said.append,  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        yield engine
    finally:
        engine.close()


def expected() -> list[list[int]]:
    seeds = [seed for prompt_seed in SEEDS for seed in request_seeds(prompt_seed, 2)]
    return [[token_at(seed, position) for position in range(5)] for seed in seeds]


def test_responses_are_in_order_and_told_of_once():
    told: list[tuple[int, list[int]]] = []
    with fake_server(version="default") as one, fake_server(version="default") as two, served([one, two]) as engine:
        rollouts = engine.generate(PROMPTS, SAMPLING, SEEDS, lambda row, tokens: told.append((row, list(tokens))))
        assert engine.generate(PROMPTS, SAMPLING, SEEDS).tokens.tolist() == rollouts.tokens.tolist()
        assert one.requests
        assert two.requests
    assert [response.tolist() for response in rollouts.responses()] == expected()
    assert sorted(told) == list(enumerate(expected()))
    assert rollouts.prompt_lengths.tolist() == [2, 2, 1, 1, 3, 3]
    assert not rollouts.finished.any()


def test_a_server_that_fails_leaves_its_share_to_the_other():
    lines: list[str] = []
    with fake_server(version="default") as one, fake_server(version="default") as two:
        one.failing_calls = {"/inference/v1/generate"}
        with served([one, two], lines, max_retries=0) as engine:
            rollouts = engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert [response.tolist() for response in rollouts.responses()] == expected()
    assert any("given up" in line and one.url in line for line in lines)


def test_without_a_server_left_the_evaluation_ends_and_says_why():
    with fake_server(version="default") as one, served([one], max_retries=0) as engine:
        one.failing_calls = {"/inference/v1/generate"}
        with pytest.raises(RunError, match=r"no server is left: .*made to fail.*; .* the same command goes on"):
            engine.generate(PROMPTS, SAMPLING, SEEDS)


def test_a_server_that_a_run_pushes_to_meanwhile_is_given_up():
    with fake_server(version="default") as one, served([one]) as engine:
        one.version = LABELS.of(3)
        with pytest.raises(RunError, match="sampled with weights '0123abcd-3', not its own: another run pushes to it;"):
            engine.generate(PROMPTS, SAMPLING, SEEDS)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"version": "7"}, "holds weights that a run pushed .7."),
        ({"version": "towards-8"}, "holds weights that a run pushed .towards-8."),
        ({"version": "default", "max_model_len": 31}, "has room for 31 tokens .*, asked are up to 32"),
        ({"version": "default", "model": "/tmp"}, "serves /tmp, not .*model; name that, or another server"),
    ],
)  # fmt: skip
def test_servers_of_something_else_are_refused(tmp_path: Path, state, message: str):
    (tmp_path / "model").mkdir()
    with (
        fake_server(**state) as one,
        pytest.raises(UsageError, match=message),
        served([one], model=str(tmp_path / "model")),
    ):
        pass


def test_a_server_that_does_not_answer_is_named():
    with fake_server(version="default") as one:
        one.failing_calls = {"/weight_info"}
        with (
            pytest.raises(RunError, match=rf"--server: {one.url}.* made to fail; start one with riskpo serve"),
            served([one]),
        ):
            pass


def test_a_path_that_is_no_folder_here_is_taken_on_trust_aloud():
    lines: list[str] = []
    with fake_server(version="default", model="/elsewhere/model") as one, served([one], lines):
        pass
    assert lines == [f"{one.url} says that its model is /elsewhere/model, no folder here: taken for model"]
