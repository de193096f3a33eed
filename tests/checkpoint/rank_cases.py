"""What two ranks do for test_convert_ranks: convert together, compare together, and fail together."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_riskpo.checkpoint import copy, safetensors_writer
from megatron_riskpo.checkpoint.check import compare
from megatron_riskpo.checkpoint.convert import write_hf, write_megatron
from megatron_riskpo.checkpoint.team import Team
from megatron_riskpo.checkpoint.to_hf import MegatronWeights
from megatron_riskpo.errors import RiskpoError

MODELS = (("qwen2", True), ("mixtral", False))


def convert(team: Team, root: Path, family: str) -> None:
    model = root / family
    hf_config = json.loads((model / "config.json").read_text())
    there, back = root / f"{family}_megatron", root / f"{family}_back"
    write_megatron(team, model, hf_config, there, None, lambda _: None)
    write_hf(team, MegatronWeights(there, hf_config), hf_config, back, None, lambda _: None)


def failure(work: Any) -> str:
    try:
        work()
    except RiskpoError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def share_work(folder: Path) -> dict[str, Any]:
    root, team = folder.parent, Team(dist.get_rank(), dist.get_world_size())
    # Several files from each rank.
    safetensors_writer.MAX_SHARD_BYTES = 500_000
    for family, _ in MODELS:
        convert(team, root, family)
    family = MODELS[0][0]
    found = {
        "equal": compare(team, root / family, root / f"{family}_megatron"),
        "differing": compare(team, root / family, root / "other"),
    }
    sendfile = os.sendfile
    if team.rank == 1:
        copy.os.sendfile = full_disk
    hf_config = json.loads((root / family / "config.json").read_text())
    found["failure"] = failure(
        lambda: write_megatron(team, root / family, hf_config, root / "never", None, lambda _: None)
    )
    copy.os.sendfile = sendfile
    return found


def full_disk(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
