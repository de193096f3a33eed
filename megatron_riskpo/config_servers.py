"""Rules about rollout servers and asynchrony (config_checks.py joins them to the others)."""

from pathlib import Path
from urllib.parse import urlsplit

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_rules import Rule, Setup


def placement(setup: Setup) -> str | None:
    rollout = setup.config.rollout
    if rollout.placement == "server":
        if rollout.engine != "vllm":
            return f'rollout.placement = "server" needs rollout.engine = "vllm", not "{rollout.engine}"'
        return None
    if rollout.max_staleness:
        return (
            f"rollout.max_staleness = {rollout.max_staleness} needs servers that sample while the step trains; set "
            'rollout.placement to "server", or max_staleness to 0'
        )
    if rollout.server_urls:
        return 'rollout.server_urls has no effect on rollout.placement = "colocated"; set it to "server"'
    return None


def server_urls(setup: Setup) -> str | None:
    urls = setup.config.rollout.server_urls
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            return f"rollout.server_urls: {url!r} is no address of a server; write http://HOST:PORT"
    if len({url.rstrip("/") for url in urls}) < len(urls):
        return f"rollout.server_urls names a server twice: {sorted(urls)}"
    return None


def transport_of(config: TrainConfig) -> str:
    """How weights reach the servers: file, network or shared_memory."""
    server = config.server
    if server.transport != "auto":
        return server.transport
    if server.transfer_dir:
        return "file"
    return "network" if config.rollout.server_urls else "shared_memory"


def transport_on_gpus(config: TrainConfig) -> str:
    """As `transport_of`, where ranks and servers are on GPUs."""
    chosen = transport_of(config)
    # CUDA IPC has not run yet: nobody gets it who has not asked for it.
    return "file" if chosen == "shared_memory" and config.server.transport == "auto" else chosen


def transport(setup: Setup) -> str | None:
    server = setup.config.server
    if server.transfer_dir and transport_of(setup.config) != "file":
        return (
            f'server.transfer_dir = {server.transfer_dir} is for server.transport = "file", not "{server.transport}"; '
            "leave one of them out"
        )
    return None


def transfer_dir(setup: Setup) -> str | None:
    folder = setup.config.server.transfer_dir
    if setup.config.rollout.placement == "server" and folder and not Path(folder).is_dir():
        return f"server.transfer_dir = {folder} is no folder; make it, on a file system that the servers see too"
    return None


def staleness_correction(setup: Setup) -> str | None:
    """Samples of older weights need the ratio to the policy that made them, somewhere. `geometric` has it nowhere: it
    rejects responses, and what it keeps counts as if the newest weights had made it."""
    config, correction = setup.config, setup.config.mismatch.correction
    uncorrected = correction in ("none", "geometric") and config.actor.old_logprobs == "recompute"
    if config.rollout.max_staleness and uncorrected:
        return (
            f"rollout.max_staleness = {config.rollout.max_staleness} trains on samples of older weights, which "
            f'mismatch.correction = "{correction}" does not weigh; set it to "tis_sequence", or to "none" with '
            'actor.old_logprobs = "rollout"'
        )
    return None


def verification(setup: Setup) -> str | None:
    verify, rollout = setup.config.bridge.verify, setup.config.rollout
    if rollout.placement != "server":
        return None
    if verify == "golden":
        return (
            'bridge.verify = "golden" compares what vLLM in the training processes holds; with rollout.placement = '
            '"server" set it to "probe", "checksum" or "none"'
        )
    if verify == "checksum" and transport_of(setup.config) == "file":
        return (
            'bridge.verify = "checksum" with server.transport = "file" does nothing more: those buckets always have a '
            'checksum; set it to "probe" or "none"'
        )
    return None


def sleep(setup: Setup) -> str | None:
    rollout = setup.config.rollout
    if not rollout.sleep:
        return None
    if rollout.placement == "server" or rollout.engine != "vllm":
        return (
            "rollout.sleep is for vLLM in the training processes, whose memory they share; set it to false, or "
            'rollout.engine to "vllm" and rollout.placement to "colocated"'
        )
    return None


def sleep_device(setup: Setup) -> str | None:
    if not setup.config.rollout.sleep:
        return None
    # Imported here: torch takes seconds, and few runs have the option.
    import torch

    return None if torch.cuda.is_available() else "rollout.sleep needs a GPU, vLLM on the CPU cannot; set it to false"


SERVER_RULES: tuple[Rule, ...] = (
    placement,
    server_urls,
    transport,
    transfer_dir,
    staleness_correction,
    verification,
    sleep,
    sleep_device,
)
