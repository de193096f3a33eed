"""What one rank does in test_old_logprobs: steps on the built-in sampler's responses, with the old log-probs from the
trainer or from the sampler. Imported by the ranks."""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.algorithms.config import MismatchConfig, PolicyLossConfig
from megatron_riskpo.config import ActorConfig, OptimizerConfig, RolloutConfig, TrainConfig
from megatron_riskpo.distributed.grid import build_grid
from megatron_riskpo.rollout.megatron_engine import MegatronEngine
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig
from tests.test_trainer import trainer

PROMPTS = [[5, 17, 33, 2], [90], [8, 40, 11, 90, 7, 23, 64, 12], [30, 31, 7]]
SAMPLING = SamplingConfig(group_size=4, max_response_tokens=10, temperature=0.7, stop_token_ids=(1, 3, 5, 7))
ADVANTAGES = torch.linspace(-2, 2, 16, dtype=torch.float64).view(4, 4)[:, [2, 0, 3, 1]]
CAP = 1.2
REINFORCE = PolicyLossConfig(kind="reinforce", aggregation="token_mean")
TRUNCATED = PolicyLossConfig(kind="cispo", aggregation="token_mean", clip_low=1.0, clip_high=CAP - 1)


@dataclass(frozen=True)
class Case:
    """How one step is made."""

    old_logprobs: str
    mini_batches: int = 1
    loss: PolicyLossConfig = PolicyLossConfig()
    mismatch: MismatchConfig = MismatchConfig()
    noise: float = 0.0
    """Standard deviation of what is added to the sampler's log-probs, in nats."""

    def config(self) -> TrainConfig:
        return TrainConfig(
            actor=ActorConfig(mini_batches=self.mini_batches, old_logprobs=self.old_logprobs, micro_batch_tokens=40),
            # A large eps: AdamW's first step is g / (|g| + eps), which near g = 0 would turn rounding into a step.
            optimizer=OptimizerConfig(lr=1e-2, eps=1e-2),
            rollout=RolloutConfig(group_size=4, temperature=SAMPLING.temperature, max_response_tokens=10),
            loss=self.loss,
            mismatch=self.mismatch,
        )


CASES = {
    **{(old, n): Case(old, n) for old in ("recompute", "rollout") for n in (1, 2)},
    "noisy ppo": Case("rollout", loss=PolicyLossConfig(kind="ppo"), noise=0.3),
    "noisy gspo": Case("rollout", loss=PolicyLossConfig(clip_low=0.02, clip_high=0.02), noise=0.3),
    "noisy, 2 mini-batches": Case("rollout", 2, noise=0.3),
    "tis": Case("recompute", loss=REINFORCE, mismatch=MismatchConfig(correction="tis", cap=CAP), noise=0.3),
    "cispo": Case("rollout", loss=TRUNCATED, noise=0.3),
    "uncorrected": Case("recompute", loss=REINFORCE, noise=0.3),
}


@dataclass
class Phases:
    """An observer that counts phases."""

    names: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str):
        self.names.append(name)
        yield


def one_step(case: Case, folder: Path) -> dict[str, Any]:
    """Sample, then score tokens and update as the trainer does."""
    config = case.config()
    actor = Actor.from_hf(
        folder.parent / "model", config.actor, config.optimizer, torch.float32, build_grid(config.actor, seed=1)
    )
    engine = MegatronEngine(actor.chunks[0], actor.grid, max_sequence_length=64, max_num_seqs=16)
    rollouts = with_noise(engine.generate(PROMPTS, SAMPLING, [3, 4, 5, 6]), case.noise)
    before = actor.logprobs(rollouts, SAMPLING.temperature)
    phases = Phases()
    one = trainer(config, actor=actor, observer=phases)
    tokens, mismatch = one.score_tokens(rollouts)
    update = one.update(rollouts, ADVANTAGES, tokens)
    return {
        "rollouts": rollouts, "before": before, "metrics": update.metrics,
        "mismatch": mismatch or one.measure_from_update(rollouts, update), "num": update.num_tokens_before,
        "phases": phases.names, "weights": {name: tensor.clone() for name, tensor in actor.export_weights()},
    }  # fmt: skip


def with_noise(rollouts: Rollouts, noise: float) -> Rollouts:
    logprobs = rollouts.rollout_logprobs
    draws = torch.randn(logprobs.numel(), generator=torch.Generator().manual_seed(2))
    return replace(rollouts, rollout_logprobs=logprobs + noise * draws)


def run(folder: Path) -> dict[Any, dict[str, Any]]:
    return {name: one_step(case, folder) for name, case in CASES.items()}
