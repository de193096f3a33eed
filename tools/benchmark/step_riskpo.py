"""This project's side of step.py, on one rank: the phases of `riskpo train`, with a reward that costs nothing."""

import argparse
import time
from pathlib import Path

import torch
from step_cases import CASES, EOS_ID, LEARNING_RATE, Case, read_prompts, reward
from step_records import StepRecord, write_records

from megatron_riskpo.algorithms import compute_advantages
from megatron_riskpo.algorithms.config import AlgorithmConfig, PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.config import ActorConfig, BridgeConfig, OptimizerConfig, RolloutConfig, RunConfig
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.distributed.launch import die_with_launcher, process_env
from megatron_riskpo.distributed.runtime import rank_runtime
from megatron_riskpo.observability.timing import PhaseTimer
from megatron_riskpo.rollout.types import Rollouts, SamplingConfig

# grpo is TRL's objective: token ratios, mean over sequences of token means (its loss_type "grpo").
OBJECTIVES = {
    "grpo": (AlgorithmConfig(estimator="grpo"), PolicyLossConfig(kind="ppo")),
    "riskpo": (AlgorithmConfig(estimator="riskpo", bundle_size=4), PolicyLossConfig()),
}


class Stepper:
    """Actor, engine and bridge of one rank."""

    def __init__(self, case: Case, folder: Path, grid: RankGrid, objective: str) -> None:
        # Megatron may only be imported once rank_runtime has put the CPU backend in place.
        from megatron_riskpo.actor.actor import Actor
        from megatron_riskpo.resharding.bridge import Bridge
        from megatron_riskpo.rollout.vllm_engine import VllmEngine

        self.case = case
        self.algorithm, self.loss = OBJECTIVES[objective]
        self.prompts = read_prompts(folder)
        self.actor = Actor.from_hf(
            folder / "model", ActorConfig(), OptimizerConfig(lr=LEARNING_RATE), torch.float32, grid
        )
        self.engine = VllmEngine(
            folder / "model", RolloutConfig(kv_cache_gib=1.0), dtype="float32", world_group=grid.world, seed=0,
            max_model_len=case.prompt_tokens[1] + case.max_response_tokens + 1,
        )  # fmt: skip
        self.bridge = Bridge(self.actor, self.engine, BridgeConfig(), seed=0)
        self.bridge.sync(0)

    def step(self, index: int, max_response_tokens: int) -> StepRecord:
        """One RL step on prompts of its own."""
        timer, start = PhaseTimer(), time.perf_counter()
        case, first = self.case, index * self.case.num_prompts
        prompts, seeds = self.prompts[first : first + case.num_prompts], range(first, first + case.num_prompts)
        with timer("rollout"):
            sampling = SamplingConfig(case.group_size, max_response_tokens, 1.0, (EOS_ID,))
            rollouts = self.engine.generate(prompts, sampling, list(seeds))
        with timer("reward"):
            rewards = torch.tensor([reward(response.tolist()) for response in rollouts.responses()])
        with timer("advantage"):
            advantages = compute_advantages(
                rewards.view(case.num_prompts, case.group_size), self.algorithm,
                generator=torch.Generator().manual_seed(index),
            ).advantages.flatten()  # fmt: skip
        with timer("update"):
            self.actor.update(
                rollouts, advantages, TokenInputs(), self.loss, 1.0, max_response_tokens,
                num_optimizer_steps_total=len(self.prompts),
            )  # fmt: skip
        with timer("sync"):
            self.bridge.sync(index + 1)
        return _record(rollouts, timer, time.perf_counter() - start, float(rewards.mean()))


def _record(rollouts: Rollouts, timer: PhaseTimer, seconds: float, mean_reward: float) -> StepRecord:
    phases = {phase: timer.seconds(phase) for phase in ("rollout", "reward", "advantage", "update", "sync")}
    return StepRecord(
        seconds, phases, int(rollouts.prompt_lengths.sum()), rollouts.response_lengths.tolist(), mean_reward
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--objective", choices=OBJECTIVES, default="grpo")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    arguments = parser.parse_args()
    die_with_launcher()
    case, env = CASES[arguments.case], process_env()
    if env is None:
        parser.error("start it through step.py, which gives it its ranks")
    with rank_runtime(env, RunConfig(), ActorConfig()) as grid:
        stepper = Stepper(case, arguments.folder, grid, arguments.objective)
        limits = [case.warmup_response_tokens] * arguments.warmup + [case.max_response_tokens] * arguments.steps
        records = [stepper.step(index, limit) for index, limit in enumerate(limits)]
        if grid.rank == 0:
            write_records(records[arguments.warmup :], arguments.output)
        stepper.engine.close()


if __name__ == "__main__":
    main()
