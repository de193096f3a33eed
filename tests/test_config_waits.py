"""Which time-outs must be below which: nobody gives up on a rank that waits for a server as long as options allow."""

import dataclasses
from typing import Any

import pytest

from megatron_riskpo.config import BridgeConfig, RolloutConfig, ServerConfig, TrainConfig, TrainRunConfig
from megatron_riskpo.config_checks import TRAIN_RULES
from megatron_riskpo.config_rules import Setup
from megatron_riskpo.config_waits import WAIT_RULES, collective_timeout, restart_limit_s, stall_limit

GIVEN = {"server_urls": ("http://a:1",)}


def config(
    run: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None, server: dict[str, Any] | None = None,
    **bridge: Any,
) -> TrainConfig:  # fmt: skip
    return TrainConfig(
        run=TrainRunConfig(**(run or {})),
        rollout=RolloutConfig(**({"placement": "server"} | (rollout or {}))),
        server=ServerConfig(**(server or {})),
        bridge=BridgeConfig(**bridge),
    )


@pytest.mark.parametrize(
    ("wrong", "terms"),
    [
        (
            config(server={"start_timeout_s": 471}),
            "server.start_timeout_s + server.push_timeout_s + 10 = 471 + 120 + 10",
        ),
        (config(server={"push_timeout_s": 121}), "5 * server.push_timeout_s = 605"),
        (
            config(server={"push_timeout_s": 301, "start_timeout_s": 9, "transport": "shared_memory"}),
            "2 * server.push_timeout_s = 602",
        ),
        (config(rollout=GIVEN, server={"push_timeout_s": 601}), "server.push_timeout_s = 601"),
        (config(rollout=GIVEN, server={"health_timeout_s": 700}), "server.health_timeout_s = 700"),
        (config(rollout=GIVEN, timeout_s=601), "bridge.timeout_s = 601"),
        (config(server={"request_timeout_s": 601}, verify="probe"), "server.request_timeout_s = 601"),
    ],
)
def test_a_wait_that_the_other_ranks_do_not_sit_out_is_refused(wrong, terms):
    found = collective_timeout(Setup(wrong, 1, {}))
    assert found is not None
    assert found.startswith(f"{terms}, how long a rank may wait for ")
    needed = sum(float(term) for term in terms.split(" = ")[1].split(" + "))
    assert (
        f"is above run.timeout_s = 600, for which the other ranks wait for it; raise run.timeout_s to {needed:g}"
        in found
    )
    # The remedy is one.
    run = dataclasses.replace(wrong.run, timeout_s=needed)
    assert collective_timeout(Setup(dataclasses.replace(wrong, run=run), 1, {})) is None


@pytest.mark.parametrize(
    "right",
    [
        config(),
        config(verify="probe"),
        config(rollout=GIVEN, server={"start_timeout_s": 9000}),
        config(rollout={"placement": "colocated"}, server={"push_timeout_s": 9000}),
        config(server={"request_timeout_s": 9000}),  # ranks that wait for responses meet meanwhile
        config(server={"push_timeout_s": 290, "transport": "network"}),
    ],
)
def test_what_the_other_ranks_sit_out_is_accepted(right):
    assert collective_timeout(Setup(right, 1, {})) is None


@pytest.mark.parametrize(("run", "start", "push"), [(600, 470, 120), (600, 300, 120), (60, 40, 10), (15, 2, 3)])
def test_whatever_is_accepted_a_restart_has_its_time_and_the_others_wait_for_it(run, start, push):
    accepted = config({"timeout_s": run}, server={"start_timeout_s": start, "push_timeout_s": push})
    assert collective_timeout(Setup(accepted, 2, {})) is None
    assert start <= restart_limit_s(accepted) <= run - push


@pytest.mark.parametrize(
    ("limit", "rollout", "longest"),
    [
        (0, {}, None),
        (931, {}, None),
        (930, {}, "server.start_timeout_s + server.push_timeout_s + 10 = 800 + 120 + 10"),
        (600, GIVEN, "server.request_timeout_s = 600"),
        (601, GIVEN, None),
    ],
)
def test_a_stall_is_longer_than_the_waits_that_servers_may_take(limit, rollout, longest):
    found = stall_limit(Setup(config({"stall_limit_s": limit}, rollout, {"start_timeout_s": 800}), 1, {}))
    assert (found is None) if longest is None else (f"as long as {longest} allows" in str(found))


def test_the_rules_are_asked_by_train():
    assert set(WAIT_RULES) <= set(TRAIN_RULES)
