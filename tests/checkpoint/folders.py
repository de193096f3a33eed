"""Checkpoint folders without a model, and ways to damage them."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_riskpo.checkpoint.manifest import Manifest, describe_file, list_files, publish, write_manifest

LAYOUT = {"tp": 2, "pp": 1, "vp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 4}
CONFIG_HASH = "0123456789abcdef"


def write_checkpoint(folder: Path, step: int, metrics: Mapping[str, float] | None = None, num_shards: int = 1) -> Path:
    """A published checkpoint of state.json and shards of 10240 bytes."""
    partial = folder / f"step_{step}.partial"
    (partial / "megatron").mkdir(parents=True)
    (partial / "state.json").write_text(json.dumps({"step": step}))
    for number in range(num_shards):
        (partial / "megatron" / f"shard_{number}").write_bytes(bytes(range(256)) * 40)
    files = {name: describe_file(partial / name) for name in list_files(partial)}
    write_manifest(partial, Manifest(step, LAYOUT, {}, {}, files, dict(metrics or {}), CONFIG_HASH))
    return publish(partial)


def truncate(path: Path, shard: str = "shard_0") -> None:
    file = path / "megatron" / shard
    file.write_bytes(file.read_bytes()[:-1])


def flip_byte(path: Path, shard: str = "shard_0") -> None:
    file = path / "megatron" / shard
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
