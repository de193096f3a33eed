"""What is said of rollout servers and asynchrony that cannot work."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from megatron_riskpo.algorithms.config import MismatchConfig
from megatron_riskpo.config import ActorConfig, BridgeConfig, RolloutConfig, ServerConfig, TrainConfig
from megatron_riskpo.config_bounds import out_of_bounds
from megatron_riskpo.config_checks import TRAIN_RULES, engine_split, problems
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.config_servers import SERVER_RULES, transport_of

TIS = {"mismatch": MismatchConfig(correction="tis")}


def on_servers(**rollout: Any) -> TrainConfig:
    return TrainConfig(rollout=RolloutConfig(placement="server", **rollout))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TrainConfig(rollout=RolloutConfig(max_staleness=1)),
            'while the step trains; set rollout.placement to "server"',
        ),
        (
            on_servers(max_staleness=2),
            'max_staleness = 2 trains on samples of older .* "none" does not weigh; .* "tis_sequence", .* "rollout"',
        ),
        (
            dataclasses.replace(on_servers(max_staleness=1), mismatch=MismatchConfig(correction="geometric", cap=1.01)),
            'correction = "geometric" does not weigh; set it to "tis_sequence"',
        ),
        (on_servers(engine="megatron"), 'needs rollout.engine = "vllm", not "megatron"'),
        (TrainConfig(rollout=RolloutConfig(server_urls=("http://a:1",))), 'no effect on rollout.placement = "coloc'),
        (on_servers(server_urls=("a:8000",)), "'a:8000' is no address of a server; write http://HOST:PORT"),
        (on_servers(server_urls=("http://a:1/v1",)), "'http://a:1/v1' is no address"),
        (on_servers(server_urls=("http://a:1", "http://a:1")), "names a server twice"),
        (dataclasses.replace(on_servers(), server=ServerConfig(transfer_dir="/no/where")), "/no/where is no folder"),
        (on_servers(sleep=True), "rollout.sleep is for vLLM in the training processes"),
        (dataclasses.replace(on_servers(), bridge=BridgeConfig(verify="golden")), '"golden" .* "checksum" or "none"'),
        (
            dataclasses.replace(
                on_servers(), bridge=BridgeConfig(verify="checksum"), server=ServerConfig(transport="file")
            ),
            'server.transport = "file" does nothing more: .* set it to "probe" or "none"',
        ),
        (
            dataclasses.replace(on_servers(), server=ServerConfig(transport="network", transfer_dir="/tmp")),
            'server.transfer_dir = /tmp is for server.transport = "file", not "network"',
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(config, message):
    found = next(problems(SERVER_RULES, Setup(config, 2, {})))
    assert re.search(message, found), found
    assert "\n" not in found


@pytest.mark.parametrize(
    "config",
    [
        on_servers(),
        on_servers(server_urls=("http://a:1", "https://[::1]:2/")),
        dataclasses.replace(on_servers(max_staleness=1), **TIS),
        dataclasses.replace(on_servers(), bridge=BridgeConfig(verify="probe")),
        dataclasses.replace(on_servers(server_urls=("http://a:1",)), bridge=BridgeConfig(verify="checksum")),
        TrainConfig(bridge=BridgeConfig(verify="golden")),
        dataclasses.replace(on_servers(max_staleness=3), actor=ActorConfig(old_logprobs="rollout")),
    ],
)
def test_what_works_is_accepted(config):
    assert not list(problems(SERVER_RULES, Setup(config, 1, {})))


@pytest.mark.parametrize(
    ("urls", "server", "expected"),
    [
        ((), {}, "shared_memory"),
        ((), {"transfer_dir": "/tmp"}, "file"),
        ((), {"transport": "network"}, "network"),
        (("http://a:1",), {}, "network"),
        (("http://a:1",), {"transfer_dir": "/tmp"}, "file"),
        (("http://a:1",), {"transport": "file"}, "file"),
        (("http://a:1",), {"transport": "shared_memory"}, "shared_memory"),
    ],
)
def test_how_weights_reach_servers(urls, server, expected):
    config = dataclasses.replace(on_servers(server_urls=urls), server=ServerConfig(**server))
    assert transport_of(config) == expected


def test_the_rules_are_asked_by_train():
    assert set(SERVER_RULES) <= set(TRAIN_RULES)


def test_a_server_may_have_more_gpus_than_the_run_has_ranks():
    model = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "model_type": "qwen2"}
    assert engine_split(Setup(on_servers(tp=2), 1, model)) is None
    assert engine_split(Setup(TrainConfig(rollout=RolloutConfig(tp=2)), 1, model)) is not None


def test_sleep_needs_a_gpu():
    found = list(problems(SERVER_RULES, Setup(TrainConfig(rollout=RolloutConfig(sleep=True)), 1, {})))
    assert ("needs a GPU" in " ".join(found)) == (not torch.cuda.is_available())


@pytest.mark.parametrize("name", [name for name, value in vars(ServerConfig()).items() if not isinstance(value, str)])
def test_every_number_has_a_range(name):
    wrong = dataclasses.replace(TrainConfig(), server=ServerConfig(**{name: -1}))
    assert f"server.{name} = -1 is out of range" in (out_of_bounds(wrong) or "")
