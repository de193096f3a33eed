"""What one rank does in test_bridge: an engine that scores with the actor's weights, or spoils its answer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.config import ActorConfig, BridgeConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.bridge import Bridge
from tests.tiny_models import hf_token_logprobs, load_hf


class HfEngine:
    """Scores with transformers on the checkpoint that the actor was loaded from."""

    shares_weights = False

    def __init__(self, model_dir: Path) -> None:
        self.model = load_hf(model_dir)
        self.weight_version = -1
        self.lag = 0
        self.spoil = 0.0

    def update_weights(self, weights: Any, version: int) -> dict[str, float]:
        for _ in weights:
            pass
        self.weight_version = version - self.lag
        return {}

    def token_logprobs(self, sequences: list[list[int]]) -> list[torch.Tensor]:
        return [hf_token_logprobs(self.model, sequence) + self.spoil for sequence in sequences]


def _shard_push(engine: HfEngine) -> Any:
    """InProcessPush that brings nothing."""
    return SimpleNamespace(
        run=lambda version: engine.update_weights((), version), report=None, in_shared_memory=True,
        sink=SimpleNamespace(pack_seconds=0.0),
    )  # fmt: skip


def outcomes(folder: Path) -> dict[str, Any]:
    """What sync says in each case, on this rank."""
    grid = build_grid(ActorConfig(), seed=0)
    model_dir = folder.parent / "model"
    actor = Actor.from_hf(model_dir, ActorConfig(), OptimizerConfig(), torch.float32, grid)
    engine = HfEngine(model_dir)
    bridge = Bridge(actor, engine, BridgeConfig(verify="probe"), seed=0)
    metrics = bridge.sync(0)
    results: dict[str, Any] = {"equal": metrics["bridge/verify_logprob_abs_mean"], "seconds": metrics["perf/push_s"]}

    def refusal(version: int) -> str:
        try:
            bridge.sync(version)
        except RunError as error:
            return str(error)
        return "accepted"

    for case, spoil in (("another weight on rank 1", 0.01), ("nan on rank 1", float("nan"))):
        engine.spoil = spoil if grid.rank == 1 else 0.0
        results[case] = refusal(1)
    bridge._in_process, given_up = _shard_push(engine), []  # the same for vLLM in the training processes
    bridge._in_process.give_up = given_up.append
    engine.spoil = 0.01
    results["given up"] = (refusal(4), given_up)
    bridge._in_process, engine.spoil, engine.lag = None, 0.0, 1
    results["another version"] = refusal(3)
    return results
