"""Real `riskpo serve` processes (vLLM on the CPU) against transformers and the in-process engine.

One server, started once, serves most tests, and one of two workers starts beside it. Not tested here: several
machines, a GPU.
"""

import contextlib
import dataclasses
import importlib.util
import json
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_riskpo.config import BridgeConfig, TrainConfig
from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.resharding.bucket_file import Bucket, write_bucket
from megatron_riskpo.rollout import server_push
from megatron_riskpo.rollout.server_engine import ServerEngine
from megatron_riskpo.rollout.server_process import ServerProcess
from megatron_riskpo.rollout.types import SamplingConfig
from tests.distributed.ranks import run_on_ranks
from tests.resharding.in_process_cases import SMALL_BUCKET_MIB
from tests.rollout import served_actor_cases
from tests.rollout.fake_server import fake_server
from tests.rollout.shard_server import ShardServer
from tests.server_runs import (
    exporter,
    server_config,
    server_engine,
    shards_of,
    signal_group,
    started_server,
    with_urls,
)
from tests.tiny_models import hf_token_logprobs, load_hf, make_tiny, make_tiny_qwen2
from tests.vllm_engines import max_difference, single_rank, vllm_engine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [20], [5, 6, 7]]
SEEDS = [3, 1, 2, 2**63 - 1]
NUM_EXPERTS = 4  # of a layer of tiny models
WHOLE_EXPERTS = {"tp": 2, "expert_parallel": True}
LAYOUTS: list[dict[str, Any]] = [{"tp": 2, "sequence_parallel": True}, {"pp": 2}]
SAMPLING = SamplingConfig(group_size=4, max_response_tokens=24, temperature=0.7, stop_token_ids=(1, 2, 3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    dense = {name: make_tiny_qwen2(folder / name, tied=True, seed=seed) for seed, name in enumerate("ab")}
    return dense | {"experts": make_tiny(folder / "experts", "qwen3_moe", tied=False, seed=0)}


@pytest.fixture(scope="module")
def servers(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ServerProcess]]:
    """By the fixture that waits for it; all that any test asks for start at once, since each takes its time."""
    tests = [item for item in request.session.items if item.path == request.path]
    asked = {name for test in tests for name in test.fixturenames}  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(started_server(config, tmp_path_factory.mktemp(name)))
            for name, config in (
                ("url", server_config(models["a"])),
                ("url_of_two_workers", server_config(models["experts"], **WHOLE_EXPERTS)),
            )
            if name in asked
        }


@pytest.fixture(scope="module")
def url(servers: dict[str, ServerProcess]) -> str:
    return servers["url"].wait()


@pytest.fixture(scope="module")
def url_of_two_workers(servers: dict[str, ServerProcess]) -> str:
    return servers["url_of_two_workers"].wait()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def engine(url: str, models: dict[str, Path], tmp_path: Path, lines: list[str]) -> Iterator[ServerEngine]:
    config = with_urls(server_config(models["a"]), url)
    with single_rank(), server_engine(config, tmp_path, exporter(models["a"]), lines) as engine:
        yield engine


@contextlib.contextmanager
def networked(
    config: TrainConfig, model: Path, folder: Path
) -> Iterator[tuple[ServerEngine, Callable[[Path, int], None]]]:
    """An engine whose weights go over the network, and a call that pushes a checkpoint."""
    shards = shards_of(model)

    def push(checkpoint: Path, version: int) -> None:
        for name, tensor in shards_of(checkpoint).parameters.items():
            shards.parameters[name].copy_(tensor)
        engine.update_weights((), version)

    with single_rank(), server_engine(config, folder, exporter(model), shards=shards) as engine:
        yield engine, push


def over_network(model: Path, *urls: str) -> TrainConfig:
    """Of several rounds."""
    bridge = BridgeConfig(bucket_mib=0.1, timeout_s=20.0, verify="checksum")
    return dataclasses.replace(with_urls(server_config(model), *urls), bridge=bridge)


def call(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One of the server's own endpoints, past the engine."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


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


def test_a_push_over_the_network_that_another_server_breaks_is_made_again(models, url, tmp_path):
    """The other one is played; this one had begun to load, and is right all the same."""
    other = ShardServer(tmp_path, {1: "corruption"}, tp=1)
    with (
        fake_server(other),
        networked(over_network(models["a"], url, other.url), models["a"], tmp_path) as (engine, push),
    ):
        other.compares = False
        for version, name, num_servers in ((0, "a", 2), (1, "b", 1), (2, "a", 2), (3, "b", 2)):
            push(models[name], version)
            assert len(engine._pool.usable) == num_servers
            other.version = "default"  # as after a restart
            engine._loop.run(engine._pool.give_up_for_all({other.url: "made to fail"}))
            rollouts = engine.generate(PROMPTS, SAMPLING, SEEDS)
            assert max_difference(rollouts, load_hf(models[name]), SAMPLING.temperature) <= 1e-5
            assert rollouts.weight_versions.tolist() == [version] * rollouts.rollout_logprobs.numel()
            (size,) = {report["bytes_received"] for report in engine._planned.reports}
            assert size == sum(tensor.nbytes for tensor in load_file(models[name] / "model.safetensors").values())


def test_layouts_that_cannot_be_are_refused_before_a_server_is_asked(models, tmp_path):
    config = over_network(models["a"], "http://127.0.0.1:9")  # where nobody listens
    config = dataclasses.replace(config, bridge=BridgeConfig(bucket_mib=1e-5))
    with pytest.raises(UsageError, match=r"bridge\.bucket_mib"), networked(config, models["a"], tmp_path):
        pass


def check_actors(model: Path, url: str, options: dict[str, Any], layouts: list[dict[str, Any]], folder: Path) -> None:
    """Two ranks, split in two ways, and their server: the same log-probs, over the network from a shard's bytes each
    time."""
    torch.save((str(model), url, options, layouts), folder / "case.pt")
    target = f"{served_actor_cases.__name__}:{served_actor_cases.outcomes.__name__}"
    found, _ = run_on_ranks(target, 2, folder / "ranks")
    assert len(found) == len(layouts) * len(served_actor_cases.TRANSPORTS)
    tp = options["tp"]
    for case, updates in found.items():
        assert len({update["mean"] for update in updates}) == len(updates)
        for update in updates:
            assert update["difference"] <= 1e-5, case
            if case.endswith("shared_memory"):
                continue
            sizes = [report["bytes_received"] for report in update["reports"]]
            assert sizes == [shard_bytes(model, tp, rank) for rank in range(tp)]
            assert update["bridge/received_mib"] == sizes[0] / 2**20
            assert update["perf/pack_s"] < update["perf/push_s"]
            assert update["bridge/peak_extra_mib"] <= 2 * SMALL_BUCKET_MIB


def shard_bytes(model: Path, tp: int, rank: int) -> int:
    """Norms and routers are whole on each rank, experts on one."""
    tensors = load_file(model / "model.safetensors")
    return sum(held_bytes(name, tensor, tp, rank) for name, tensor in tensors.items())


def held_bytes(name: str, tensor: torch.Tensor, tp: int, rank: int) -> int:
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if expert:
        return tensor.nbytes if int(expert[1]) * tp // NUM_EXPERTS == rank else 0
    if "norm" in name or "mlp.gate." in name:
        return tensor.nbytes
    if "embed_tokens" in name or "lm_head" in name:
        rows = -(-len(tensor) // 64) * 64 // tp  # vLLM pads the vocabulary to 64 rows, which nobody sends
        return tensor[rank * rows : (rank + 1) * rows].nbytes
    return tensor.nbytes // tp


def test_actors_of_two_ranks_push_to_a_server_by_plan(models, url, tmp_path):
    check_actors(models["a"], url, {"tp": 1}, LAYOUTS, tmp_path)


def test_samples_are_those_of_the_engine_in_process(engine, models):
    engine.update_weights(exporter(models["b"])(), 1)
    served = engine.generate(PROMPTS, SAMPLING, SEEDS)
    with vllm_engine(models["b"]) as in_process:
        expected = in_process.generate(PROMPTS, SAMPLING, SEEDS)
    assert torch.equal(served.tokens, expected.tokens)
    assert torch.equal(served.finished, expected.finished)
    torch.testing.assert_close(served.rollout_logprobs, expected.rollout_logprobs, atol=1e-5, rtol=0)
    assert 0 < served.finished.sum() < served.num_sequences


def test_responses_are_told_of_while_others_are_sampled(models, url, tmp_path):
    config = with_urls(server_config(models["a"], server={"max_concurrent": 2}), url)
    told: dict[int, list[int]] = {}
    with single_rank(), server_engine(config, tmp_path, exporter(models["a"])) as engine:
        engine.update_weights(exporter(models["a"])(), 0)
        pending = engine.submit(PROMPTS, SAMPLING, SEEDS)
        unfinished: list[int] = []

        def tell(row: int, tokens: list[int]) -> None:
            assert row not in told
            told[row] = list(tokens)
            unfinished.append(sum(not response.reason for response in pending.responses))

        rollouts = engine.collect(pending, tell)
    assert told == {row: response.tolist() for row, response in enumerate(rollouts.responses())}
    assert unfinished[0] > 0


def pushed_meanwhile(engine, models, delay_s: float):
    """Rollouts begun with version 0, model a; versions after it are model b."""
    engine.update_weights(exporter(models["a"])(), 0)
    sampling = SamplingConfig(group_size=32, max_response_tokens=40, temperature=1.0, stop_token_ids=())
    pending = engine.submit(PROMPTS, sampling, SEEDS)
    time.sleep(delay_s)
    while not any(response.tokens for response in pending.responses):
        engine.update_weights(exporter(models["b"])(), engine.weight_version + 1)
    return engine.collect(pending)


def test_responses_under_way_go_on_with_the_new_weights(engine, models):
    """Each token's log-prob is that of the model of its version, given all tokens before it."""
    # When a push finds responses begun and not ended depends on the machine.
    for delay_s in (0.0, 0.1, 0.3, 1.0, 3.0):
        rollouts = pushed_meanwhile(engine, models, delay_s)
        versions = rollouts.split_by_response(rollouts.weight_versions)
        if any(0 in of.tolist() and max(of.tolist()) > 0 for of in versions):
            break
    else:
        pytest.fail("no response was sampled with the weights of two versions")
    assert rollouts.response_lengths.tolist() == [40] * 128
    assert all(torch.equal(of, of.sort().values) for of in versions)
    scores = {name: load_hf(models[name]) for name in "ab"}
    logprobs = rollouts.split_by_response(rollouts.rollout_logprobs)
    for sequence, prompt, own, of in zip(
        rollouts.sequences(), rollouts.prompt_lengths, logprobs, versions, strict=True
    ):
        by_version = [hf_token_logprobs(scores[name], sequence.tolist())[prompt - 1 :] for name in "ab"]
        expected = torch.where(of == 0, *by_version)
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


def test_responses_go_on_from_what_a_checkpoint_has_of_them(engine, models):
    engine.update_weights(exporter(models["a"])(), 0)
    sampling = SamplingConfig(group_size=2, max_response_tokens=12, temperature=1.0, stop_token_ids=())
    pending = engine.submit(PROMPTS, sampling, SEEDS)
    whole = engine.collect(pending)
    for response in pending.responses:
        response.tokens, response.logprobs, response.versions = (
            column[:7] for column in (response.tokens, response.logprobs, response.versions)
        )
        response.reason = ""
    engine.update_weights(exporter(models["b"])(), 1)
    rollouts = engine.collect(engine.submit(PROMPTS, sampling, SEEDS, engine.under_way(pending)))
    assert rollouts.response_lengths.tolist() == [12] * 2 * len(PROMPTS)
    scores = [load_hf(models[name]) for name in "ab"]
    for sequence, before, prompt, own, of in zip(
        rollouts.sequences(), whole.sequences(), rollouts.prompt_lengths,
        rollouts.split_by_response(rollouts.rollout_logprobs), rollouts.split_by_response(rollouts.weight_versions),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(sequence[: prompt + 7], before[: prompt + 7])
        assert of.tolist() == [0] * 7 + [1] * 5
        by_version = [hf_token_logprobs(model, sequence.tolist())[prompt - 1 :] for model in scores]
        torch.testing.assert_close(own, torch.where(of == 0, *by_version), atol=1e-5, rtol=0)


def test_weights_that_were_not_pushed_are_refused_and_pushed_again(engine, models, url, lines):
    engine.update_weights(exporter(models["a"])(), 0)
    expected = engine.generate(PROMPTS, SAMPLING, SEEDS)
    call(url, "/update_weight_version", {"new_version": "99"})
    told: list[int] = []
    again = engine.generate(PROMPTS, SAMPLING, SEEDS, lambda row, tokens: told.append(row))
    assert torch.equal(again.tokens, expected.tokens)
    assert sorted(told) == list(range(expected.num_sequences)), "once, though all was asked twice"
    (line,) = lines
    assert f"{url} sampled with weights '99', not of version 0: this run did not push them" in line


def test_wrong_prompts_are_refused_before_they_are_sent(engine, models):
    engine.update_weights(exporter(models["a"])(), 0)
    with pytest.raises(UsageError, match=r"0\.\.95; check the tokenizer"):
        engine.submit([[96]], SAMPLING, [0])


@pytest.mark.slow
def test_actors_of_two_ranks_push_to_two_workers_with_experts_of_their_own(models, url_of_two_workers, tmp_path):
    """Here, and not earlier: the server has had time to start while others were tested."""
    url, model = url_of_two_workers, models["experts"]
    check_actors(model, url, WHOLE_EXPERTS, [LAYOUTS[0] | {"ep": 2}, LAYOUTS[1]], tmp_path)
    by_file = with_urls(server_config(model, server={"transport": "file"}), url)
    with single_rank(), server_engine(by_file, tmp_path, exporter(model)) as engine:
        engine.update_weights(exporter(model)(), 1)  # to vLLM's own loaders
        rollouts = engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert max_difference(rollouts, load_hf(model), SAMPLING.temperature) <= 1e-5
    config = over_network(model, url)
    other = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, tp=2))
    alike = "this server has rollout.expert_parallel = true, the run that pushes weights false; set both alike"
    with networked(other, model, tmp_path) as (_, push), pytest.raises(RunError, match=alike):
        push(model, 2)
    call(url, "/init_weight_transfer_engine", {"init_info": {"transport": "file", "options": {"num_tensors": 1}}})
    for _ in range(2):  # both workers fail, and no answer is left for the next call
        call(url, "/start_weight_update", {})
        with pytest.raises(urllib.error.HTTPError, match="500"):
            call(url, "/update_weights", {"update_info": {"content": {}}})


def test_a_stopped_server_ends_the_run_in_bounded_time_and_may_come_back(models, servers, url, tmp_path):
    config = with_urls(server_config(models["a"], server={"health_timeout_s": 2.0}), url)
    with single_rank(), server_engine(config, tmp_path, exporter(models["a"])) as engine:
        engine.update_weights(exporter(models["a"])(), 0)
        expected = engine.generate(PROMPTS, SAMPLING, SEEDS)
        pending = engine.submit(PROMPTS, SAMPLING, SEEDS)
        signal_group(servers["url"], signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(RunError, match=rf"no rollout server is left: {url} did not answer its health check"):
            engine.collect(pending)
        assert time.monotonic() - started < 20
        signal_group(servers["url"], signal.SIGCONT)
        engine.update_weights(exporter(models["a"])(), 1)
        assert torch.equal(engine.generate(PROMPTS, SAMPLING, SEEDS).tokens, expected.tokens)


def write_corrupted(path: Path, bucket: Bucket) -> dict[str, Any]:
    record = write_bucket(path, bucket)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return record


def test_a_corrupted_bucket_is_named_and_leaves_no_server(engine, models, monkeypatch, url):
    engine.update_weights(exporter(models["a"])(), 0)
    monkeypatch.setattr(server_push, "write_bucket", write_corrupted)
    message = r"no rollout server is left: push of version 1 failed: .*/update_weights answered 500: .* has checksum"
    with pytest.raises(RunError, match=message):
        engine.update_weights(exporter(models["b"])(), 1)
    assert re.fullmatch(r"towards-\w+-1", call(url, "/weight_info")["weight_version"])


def test_a_half_updated_server_is_not_used(models, url, tmp_path):
    """The one that the test above left behind."""
    config = with_urls(server_config(models["a"]), url)
    message = rf"a push broke off, or is under way, in {url} \(weights 'towards-\w+-1'\); start servers anew"
    with single_rank(), pytest.raises(RunError, match=message), server_engine(config, tmp_path, exporter(models["a"])):
        pass
