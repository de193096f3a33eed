"""What goes into a checkpoint, as it is at one moment: the part that needs the actor and its process groups."""

import io
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.checkpoint.manifest import Manifest
from megatron_riskpo.checkpoint.rng import rng_state
from megatron_riskpo.checkpoint.sharded import Parts, collect_parts
from megatron_riskpo.config_io import config_hash

PACKAGES = ("megatron-riskpo", "megatron-core", "torch", "transformers")


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint."""

    parts: Parts
    """Model and optimizer."""
    rng: bytes
    """The file of this rank's random number generators."""
    rollouts: bytes
    """The file of this rank's rollouts under way; empty: there are none."""
    document: str
    """The text of state.json."""
    manifest: Manifest
    """Still without files."""


def take_snapshot(
    step: int, actor: Actor, state: dict[str, Any], config: dict[str, Any], metrics: Mapping[str, float],
    rollouts: Mapping[str, Any], *, detached: bool,
) -> Snapshot:  # fmt: skip
    """What `write_checkpoint` writes. Collective; call it inside `actor.optimizer_state()`.

    state and config (resolved): JSON-able, the same on every rank. metrics: the evaluation's. rollouts: of
    this rank, under way, as a weights_only load reads them. detached: training may go
    on before it is written, for which the weights, and an optimizer's state that is not gathered anyway, are copied to
    host memory.
    """
    document = {"step": step, "num_optimizer_steps": actor.num_optimizer_steps, "trainer": state, "config": config}
    return Snapshot(
        collect_parts(actor, detached=detached),
        _file_of(rng_state()),
        _file_of(dict(rollouts)) if rollouts else b"",
        json.dumps(document),
        Manifest(
            step, layout_of(actor), content_of(actor), _versions(), {}, dict(metrics), config_hash=config_hash(config)
        ),
    )


def _file_of(content: dict[str, Any]) -> bytes:
    # Not torch.save to a path: its C++ writer would hide which error of the system stopped it.
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def layout_of(actor: Actor) -> dict[str, int]:
    """Manifest.layout of what this actor saves."""
    sizes = {name: getattr(actor.config, name) for name in ("tp", "pp", "vp", "cp", "ep", "etp")}
    return sizes | {"dp": actor.grid.dp.size()}


def content_of(actor: Actor) -> dict[str, Any]:
    """Manifest.content of what this actor saves, and of what it can load."""
    transformer = actor.chunks[0].config
    return asdict(actor.shape) | {
        "hidden_size": transformer.hidden_size,
        "intermediate_size": transformer.ffn_hidden_size,
        "dtype": str(transformer.params_dtype).removeprefix("torch."),
        "distributed_optimizer": actor.config.distributed_optimizer,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
