"""The RiskPO loop: generate, score, advantages, update, sync."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.algorithms import QuantileTracker, compute_advantages
from megatron_riskpo.algorithms.diagnostics import cov_logprob_advantage
from megatron_riskpo.algorithms.mismatch import mismatch_sums
from megatron_riskpo.algorithms.policy_loss import segment_mean
from megatron_riskpo.checkpoint.training_state import save_checkpoint
from megatron_riskpo.config import TrainConfig
from megatron_riskpo.data.stream import PromptStream, sample_seeds
from megatron_riskpo.distributed.signals import StopSignal, agree
from megatron_riskpo.evaluation.evaluate import evaluate
from megatron_riskpo.observability.observer import Observer
from megatron_riskpo.resharding.bridge import Bridge
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.scoring import Rewards, score_rollouts
from megatron_riskpo.rollout.types import RolloutEngine, Rollouts, SamplingConfig


@dataclass(frozen=True)
class EncodedQuestions:
    """Questions as the engine and the graders take them."""

    prompts: list[list[int]]
    problems: list[str]
    answers: list[str]


@dataclass
class Trainer:
    """One rank of the run; all ranks go through the same steps."""

    config: TrainConfig
    actor: Actor
    engine: RolloutEngine
    bridge: Bridge
    pool: GraderPool
    tokenizer: Any
    train_set: EncodedQuestions
    held_out: EncodedQuestions
    stream: PromptStream
    stop_token_ids: tuple[int, ...]
    stop: StopSignal
    observer: Observer
    run_dir: Path
    tracker: QuantileTracker | None = None
    step: int = 0
    """Steps done."""

    def run(self) -> bool:
        """Train to the last step; False if a signal ended the run before (its checkpoint is saved)."""
        self.bridge.sync(self.step)
        if self.step == 0:
            self.observer.record(0, self.evaluate())
        stopping = False
        while self.step < self.config.run.steps and not stopping:
            self.step += 1
            metrics = self.train_step()
            stopping = agree(self.stop, self.actor.grid.world)
            last = self.step == self.config.run.steps
            # A scheduler's grace is short: with a signal pending the checkpoint comes first.
            if last or (not stopping and _due(self.step, self.config.evaluation.every)):
                metrics |= self.evaluate()
            # Before the checkpoint: a run killed in between makes the step again, metrics included.
            self.observer.record(self.step, metrics)
            if last or stopping or _due(self.step, self.config.checkpoint.every):
                with self.observer.phase("checkpoint"):
                    self.save()
                self.observer.record_times(self.step)
        return self.step == self.config.run.steps

    def train_step(self) -> dict[str, float]:
        """One RL step; returns its metrics."""
        config, phase = self.config, self.observer.phase
        rows = self.stream.next_batch()
        seeds = sample_seeds(config.run.seed, self.step, len(rows), "train")
        with phase("rollout"):
            sampling = self.sampling(config.rollout.group_size, config.rollout.temperature)
            rollouts = self.engine.generate([self.train_set.prompts[row] for row in rows], sampling, seeds)
        with phase("reward"):
            answers = [self.train_set.answers[row] for row in rows]
            rewards = score_rollouts(
                rollouts, answers, self.tokenizer, self.pool, config.rewards.answer_form, self.actor.grid.world
            )
        with phase("advantage"):
            # A generator of the step's own: bundles need no state in the checkpoint.
            generator = torch.Generator().manual_seed(sample_seeds(config.run.seed, self.step, 1, "bundles")[0])
            lengths = rollouts.response_lengths.view_as(rewards.matrix)
            estimate = compute_advantages(
                rewards.matrix, config.algorithm, tracker=self.tracker, lengths=lengths, generator=generator
            )
            self.tracker = estimate.tracker
            advantages = estimate.advantages.flatten()
            self.warn_without_signal(estimate.metrics)
        with phase("update"):
            # With one mini-batch the policy has not moved yet: its own log-probs are the old ones.
            several = config.actor.mini_batches > 1
            old = self.actor.logprobs(rollouts, config.rollout.temperature) if several else None
            update = self.actor.update(
                rollouts, advantages, old, config.loss, config.rollout.temperature,
                num_optimizer_steps_total=config.run.steps * config.actor.mini_batches,
            )  # fmt: skip
            trainer_logprobs = update.logprobs if old is None else old
        with phase("sync"):
            synced = self.bridge.sync(self.step)
        self.observer.save_samples(self.step, lambda n: self.sample_rows(rows[:n], rollouts, rewards, advantages))
        return {
            **estimate.metrics,
            "reward/errors": float(rewards.errors.sum()),
            **update.metrics,
            **cov_logprob_advantage(segment_mean(trainer_logprobs, rollouts.response_lengths), advantages),
            **mismatch_sums(rollouts.rollout_logprobs, trainer_logprobs).metrics(),
            **synced,
            "rollout/response_length": float(rollouts.response_lengths.double().mean()),
            "rollout/truncated": float((~rollouts.finished).double().mean()),
            "rollout/tokens_per_second": float(rollouts.response_lengths.sum()) / self.observer.seconds("rollout"),
        }

    def warn_without_signal(self, metrics: dict[str, float]) -> None:
        """Say it when a step has nothing to learn from: a run in that state may not leave it by itself."""
        if metrics["risk/zero_advantage_share"] == 1.0:
            remedy = "harder" if metrics["reward/solve_all"] > metrics["reward/solve_none"] else "easier"
            if self.config.algorithm.estimator == "riskpo":
                remedy += " questions, smaller bundles or a larger algorithm.beta"
            else:
                remedy += " questions or larger groups"
            self.observer.log(
                f"step {self.step}: all advantages are 0, nothing to learn (mean reward {metrics['reward/mean']:.3f}, "
                f"q_beta {metrics['risk/q_beta']:g}); use {remedy}"
            )

    def sample_rows(
        self, questions: list[int], rollouts: Rollouts, rewards: Rewards, advantages: Tensor
    ) -> list[dict[str, Any]]:
        """The responses to the step's first questions, as a person would read them."""
        group_size = rewards.matrix.size(1)
        num_rows = len(questions) * group_size
        texts = self.tokenizer.batch_decode(rollouts.responses()[:num_rows], skip_special_tokens=True)
        return [
            {
                "problem": self.train_set.problems[questions[row // group_size]],
                "expected_answer": self.train_set.answers[questions[row // group_size]],
                "response": texts[row],
                "reward": float(rewards.matrix.flatten()[row]),
                "finished": bool(rollouts.finished[row]),
                "advantage": float(advantages[row]),
            }
            for row in range(num_rows)
        ]

    def evaluate(self) -> dict[str, float]:
        """pass@k on the held-out questions; always with the same seeds, so that evaluations compare."""
        config = self.config.evaluation
        seeds = sample_seeds(self.config.run.seed, 0, len(self.held_out.prompts), "evaluation")
        with self.observer.phase("evaluation"):
            return evaluate(
                self.engine, self.held_out.prompts, self.held_out.answers,
                self.sampling(config.num_samples, config.temperature), seeds, config, self.tokenizer, self.pool,
                self.config.rewards.answer_form, self.actor.grid.world,
            )  # fmt: skip

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on."""
        state = {
            "step": self.step,
            "stream": self.stream.state_dict(),
            "tracker": self.tracker.state_dict() if self.tracker is not None else None,
        }
        save_checkpoint(self.run_dir / "checkpoints", self.step, self.actor, state, self.config.checkpoint.keep)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `save`'s state; the actor has loaded its own part."""
        self.step = state["step"]
        self.stream.load_state_dict(state["stream"])
        self.tracker = QuantileTracker.from_state_dict(state["tracker"]) if state["tracker"] is not None else None

    def sampling(self, group_size: int, temperature: float) -> SamplingConfig:
        """How this run samples, but for the two things in which training and evaluation differ."""
        return SamplingConfig(group_size, self.config.rollout.max_response_tokens, temperature, self.stop_token_ids)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
