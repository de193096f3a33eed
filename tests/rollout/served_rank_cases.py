"""What each of two ranks does in test_attendance: a server fails for the second one's questions only."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.types import SamplingConfig
from tests.server_runs import exporter, server_config, server_engine, with_urls

PROMPTS, SEEDS = [[5], [6], [7], [8]], [3, 1, 4, 2]
SAMPLING = SamplingConfig(group_size=4, max_response_tokens=8, temperature=1.0, stop_token_ids=(1,))


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """With each list of servers in `case.json` of folder.parent: the responses, or the error; the servers still used;
    what was said."""
    case = json.loads((folder.parent / "case.json").read_text())
    return [_outcome(Path(case["model"]), urls, folder) for urls in case["servers"]]


def _outcome(model: Path, urls: list[str], folder: Path) -> dict[str, Any]:
    options = {"transport": "file", "max_retries": 0, "max_restarts": 1}
    config = with_urls(server_config(model, server=options), *urls)
    lines: list[str] = []
    found: dict[str, Any] = {"lines": lines}
    with server_engine(config, folder, exporter(model), lines) as engine:
        engine.update_weights(exporter(model)(), 0)
        dist.barrier()
        try:
            rollouts = engine.generate(PROMPTS, SAMPLING, SEEDS)
            found["tokens"] = [response.tolist() for response in rollouts.responses()]
        except RunError as error:
            found["error"] = str(error)
        found["usable"] = [server.client.url for server in engine._pool.usable]
    return found
