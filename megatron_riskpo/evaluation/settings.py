"""evaluation.json: what decides the answers of an evaluation; only the same evaluation goes on in its folder."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_riskpo.config_io import resolved, write_json
from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.benchmarks import Benchmark
from megatron_riskpo.evaluation.options import IDLE_OPTIONS, EvaluateConfig
from megatron_riskpo.evaluation.outputs import RESULTS_FOLDER

SETTINGS_FILE = "evaluation.json"
SECTIONS = ("options", "model", "data", "servers")
FREE_OPTIONS = (
    *("run.ranks", "run.timeout_s", "rollout.tp", "rollout.max_num_seqs", "rollout.kv_cache_gib"),
    *("rollout.gpu_memory_utilization", "rewards.workers", "rewards.timeout_s", "rewards.max_error_share"),
    *("rewards.gold_checks", "rollout.expert_parallel"),
)
"""Options that change the speed of an evaluation, not what it asks; so do all of [server]."""
NUM_BLOCKS, BLOCK_BYTES = 64, 1 << 16
"""What is read of each weight file to tell it from another: training moves all of a model's weights."""


def settings(config: EvaluateConfig, benchmarks: Mapping[str, Benchmark]) -> dict[str, Any]:
    """JSON-able: the options that decide, the model's and the tokenizer's files, the question files."""
    folder = Path(config.model.path)
    options = {
        f"{section}.{name}": value
        for section, values in resolved(config).items()
        for name, value in values.items()
        if section != "server" and f"{section}.{name}" not in (*IDLE_OPTIONS, *FREE_OPTIONS)
    }
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".model"))
    weights = sorted(folder.glob("*.safetensors"))
    prompt = Path(config.data.prompt_config)
    if config.data.prompt_config:
        files.append(prompt)
    return {
        "options": options,
        "model": {path.name: fingerprint(path) for path in (*files, *weights)},
        "data": {name: benchmark.digest for name, benchmark in benchmarks.items()},
    }


def check_settings(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise UsageError if another evaluation has begun in `folder`. More samples and further question files go on."""
    path = folder / SETTINGS_FILE
    if not _has_answers(folder):
        return
    if not path.is_file():
        raise UsageError(
            f"{folder} holds outputs without {SETTINGS_FILE}, of another program; choose another --out "
            f"(riskpo evaluate --from {folder} sums them up)"
        )
    found = _read(folder)
    changed = [f"{key} was {found.get('options', {}).get(key)!r}, is {value!r}"
               for key, value in wanted["options"].items() if found.get("options", {}).get(key) != value]  # fmt: skip
    if found.get("model") != wanted["model"]:
        changed.append("the model's files have changed")
    changed += [f"the questions of {name} have changed" for name, digest in wanted["data"].items()
                if found.get("data", {}).get(name, digest) != digest]  # fmt: skip
    if changed:
        raise UsageError(
            f"{folder} holds another evaluation: {'; '.join(changed)}; restore that, remove the folder, or choose "
            "another --out"
        )


def write_settings(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Before the first answer; what earlier calls asked besides stays named."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _read(folder) if _has_answers(folder) else {}
    servers = {"servers": earlier["servers"]} if "servers" in earlier else {}
    write_json(folder / SETTINGS_FILE, {**wanted, "data": earlier.get("data", {}) | wanted["data"], **servers})


def note_servers(folder: Path, cards: Mapping[str, Mapping[str, Any]]) -> None:
    """Which servers were asked, by address, and what each says of its model: it may be on another machine."""
    found = _read(folder)
    write_json(folder / SETTINGS_FILE, {**found, "servers": found.get("servers", {}) | cards})


def _read(folder: Path) -> dict[str, Any]:
    """Raises UsageError."""
    path = folder / SETTINGS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON ({error}); remove {folder} or choose another --out") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name, {}), dict) for name in SECTIONS):
        raise UsageError(
            f"{path} is no JSON object with objects {', '.join(SECTIONS)}; remove {folder} or choose another --out"
        )
    return found


def _has_answers(folder: Path) -> bool:
    """Without any, an earlier call was refused: the next one may be of another kind."""
    return any(file.stat().st_size for file in folder.glob(f"{RESULTS_FOLDER}/*/output*.jsonl*"))


def fingerprint(path: Path) -> str:
    """SHA-256 of the file's size and of NUM_BLOCKS blocks spread over it (of all of it, where it is small)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= NUM_BLOCKS * BLOCK_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for block in range(NUM_BLOCKS):
            file.seek(block * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
