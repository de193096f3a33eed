"""Rules about how long ranks may wait (config_checks.py joins them to the others)."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_rules import Rule, Setup
from megatron_riskpo.config_servers import transport_of

LOOK_AROUND_S = 10.0
"""Within so many seconds rank 0 finds out which servers can take weights."""


@dataclass(frozen=True)
class Wait:
    """As long as options allow, one after the other: `terms` has their seconds."""

    terms: dict[str, float]
    what: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def options(self) -> list[str]:
        """To lower."""
        return [term.split()[-1] for term in self.terms if "." in term]

    def __str__(self) -> str:
        return f"{' + '.join(self.terms)} = {' + '.join(f'{seconds:g}' for seconds in self.terms.values())}"


def server_waits(config: TrainConfig) -> list[Wait]:
    """Of one rank for servers, while the others wait for it in one collective. Responses are not among them: ranks that
    wait for those meet meanwhile (rollout/attendance.py)."""
    if config.rollout.placement != "server":
        return []
    server, bridge = config.server, config.bridge
    if config.rollout.server_urls:
        waits = [Wait({"server.health_timeout_s": server.health_timeout_s}, "for servers that are there")]
    else:
        terms = {"server.start_timeout_s": server.start_timeout_s, "server.push_timeout_s": server.push_timeout_s}
        waits = [
            Wait(terms | {f"{LOOK_AROUND_S:g}": LOOK_AROUND_S}, "for a server that is started again before a push")
        ]
    if transport_of(config) == "network":
        waits.append(Wait({"bridge.timeout_s": bridge.timeout_s}, "for a group with the servers' workers"))
        waits.append(Wait({"server.push_timeout_s": server.push_timeout_s}, "for servers that get weights"))
    else:
        # With files, to which shared memory falls back, four buckets may have to be loaded once the last tensor has
        # been gathered: two under way, and two to be written.
        parts = 2 if server.transport == "shared_memory" else 5
        waits.append(Wait({f"{parts} * server.push_timeout_s": parts * server.push_timeout_s}, "for the end of a push"))
    if bridge.verify == "probe":
        waits.append(Wait({"server.request_timeout_s": server.request_timeout_s}, "for the log-probs of bridge.verify"))
    return waits


def restart_limit_s(config: TrainConfig) -> float:
    """How long rank 0 may wait for a server to be started again, as often as that takes: the others, in a collective,
    wait until the server has stopped for the push as well."""
    return config.run.timeout_s - config.server.push_timeout_s - LOOK_AROUND_S


def longest(waits: Iterable[Wait]) -> Wait:
    return max(waits, key=lambda wait: wait.seconds)


def collective_timeout(setup: Setup) -> str | None:
    """Else the others give up while the server is within its time."""
    waits, limit = server_waits(setup.config), setup.config.run.timeout_s
    if not waits or longest(waits).seconds <= limit:
        return None
    wait = longest(waits)
    return (
        f"{wait}, how long a rank may wait {wait.what}, is above run.timeout_s = {limit:g}, for which the other ranks "
        f"wait for it; raise run.timeout_s to {wait.seconds:g}, or lower {' or '.join(wait.options)}"
    )


def stall_limit(setup: Setup) -> str | None:
    """A wait that another option allows is no stall."""
    config, limit = setup.config, setup.config.run.stall_limit_s
    # A rank that has come waits for rank 0, and then for as long as rank 0 waits for the others.
    agreement = {"2 * bridge.timeout_s": 2 * config.bridge.timeout_s}
    gather = {"run.timeout_s": config.run.timeout_s} if config.bridge.verify == "golden" else {}
    allowed = [Wait(gather | agreement), *server_waits(config)]
    if config.rollout.placement == "server":
        allowed.append(Wait({"server.request_timeout_s": config.server.request_timeout_s}))
    wait = longest(allowed)
    if 0 < limit <= wait.seconds:
        return (
            f"run.stall_limit_s = {limit:g} would end a run that waits as long as {wait} allows; raise it, or lower "
            f"{' or '.join(wait.options)} (run.stall_limit_s = 0: no watchdog)"
        )
    return None


WAIT_RULES: tuple[Rule, ...] = (collective_timeout, stall_limit)
