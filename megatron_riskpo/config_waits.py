"""Rules about how long ranks may wait (config_checks.py joins them to the others)."""

from megatron_riskpo.config_rules import Rule, Setup


def stall_limit(setup: Setup) -> str | None:
    """A wait that another option allows is no stall."""
    config, limit = setup.config, setup.config.run.stall_limit_s
    allowed = {"bridge.timeout_s": config.bridge.timeout_s}
    if config.rollout.placement == "server":
        allowed["server.request_timeout_s"] = config.server.request_timeout_s
        if not config.rollout.server_urls:
            allowed["server.start_timeout_s"] = config.server.start_timeout_s
    longest = max(allowed, key=lambda option: allowed[option])
    if 0 < limit <= allowed[longest]:
        return (
            f"run.stall_limit_s = {limit:g} would end a run that waits as long as {longest} = {allowed[longest]:g} "
            f"allows; raise it, or lower {longest} (run.stall_limit_s = 0: no watchdog)"
        )
    return None


WAIT_RULES: tuple[Rule, ...] = (stall_limit,)
