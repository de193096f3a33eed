"""The RiskPO loop: collect (generate and score), advantages, update, sync."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.actor.actor import Actor, UpdateOutputs
from megatron_riskpo.actor.flops import ModelFlops
from megatron_riskpo.actor.reference import ReferenceWeights
from megatron_riskpo.algorithms.diagnostics import cov_logprob_advantage
from megatron_riskpo.algorithms.kl import kl_penalty
from megatron_riskpo.algorithms.mismatch import correct_mismatch, mismatch_sums, needs_old_logprobs
from megatron_riskpo.algorithms.segments import segment_mean
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.checkpoint.saver import CheckpointSaver
from megatron_riskpo.collect import Groups, collect
from megatron_riskpo.config import TrainConfig
from megatron_riskpo.data.sources import Question
from megatron_riskpo.data.stream import sample_seeds
from megatron_riskpo.distributed.signals import StopSignal, agree
from megatron_riskpo.errors import RunError
from megatron_riskpo.evaluation.evaluate import evaluate
from megatron_riskpo.objective import Objective, without_signal
from megatron_riskpo.observability.observer import Observer
from megatron_riskpo.observability.performance import peak_flops, update_metrics
from megatron_riskpo.resharding.bridge import Bridge
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.reference import Reference
from megatron_riskpo.rewards.scoring import Scoring, mean_by_source
from megatron_riskpo.rewards.shaping import shaped_rewards
from megatron_riskpo.rollout.source import RolloutSource, staleness_metrics
from megatron_riskpo.rollout.types import RolloutEngine, Rollouts


@dataclass(frozen=True)
class EncodedQuestions:
    """Questions as the engine and the graders take them."""

    prompts: list[list[int]]
    questions: list[Question]
    references: list[Reference]


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
    source: RolloutSource
    stop: StopSignal
    observer: Observer
    run_dir: Path
    saver: CheckpointSaver
    objective: Objective
    reference: ReferenceWeights | None = None
    """Of the model that the run started from, where the loss has a KL penalty."""
    evaluation_sets: dict[str, EncodedQuestions] = field(default_factory=dict)
    """Further held-out questions, by the name that their metrics have."""
    step: int = 0
    """Steps done."""

    def run(self) -> bool:
        """Train to the last step; False if a signal ended the run before (its checkpoint is saved)."""
        self.bridge.sync(self.step)
        if self.step == 0:
            self.observer.record(0, self.evaluate())
        stopping = False
        while self.step < self.config.run.steps and not stopping:
            self.saver.check()
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
                    self.save(metrics)
                    if last or stopping:
                        self.saver.wait()
                self.observer.record_phases(self.step)
        return self.step == self.config.run.steps

    def train_step(self) -> dict[str, float]:
        """One RL step; returns its metrics."""
        collected = collect(self.draw, self.config.rollout)
        self.source.prefetch(self.step)
        self.engine.release()
        batch = collected.batch
        tokens, mismatch = self.score_tokens(batch.rollouts)
        with self.observer.phase("advantage"):
            shaped = self.shape(batch, tokens)
            advantages, learning = self.objective.advantages(collected, shaped, self.bundle_generator())
        self.warn_without_signal(learning)
        with self.observer.phase("update"):
            update = self.update(batch.rollouts, advantages, tokens)
        mismatch = mismatch or self.measure_from_update(batch.rollouts, update)
        with self.observer.phase("sync"):
            synced = self.bridge.sync(self.step)
        self.observer.save_samples(self.step, lambda n: self.sample_rows(batch, shaped, advantages, n))
        logprobs = update.logprobs if tokens.old_logprobs is None else tokens.old_logprobs
        mean_logprobs = segment_mean(logprobs, batch.rollouts.response_lengths).view_as(advantages)
        covariances = cov_logprob_advantage(mean_logprobs, advantages, batch.rewards.matrix)
        sampled = collected.metrics | self.rollout_metrics(collected.drawn.rollouts)
        sampled |= self.source_metrics(collected.drawn)
        source = {"actor/old_logprobs_from_rollout": float(self.config.actor.old_logprobs == "rollout")}
        speed = self.update_speed(batch.rollouts)
        return {**learning, **update.metrics, **source, **covariances, **mismatch, **synced, **sampled, **speed}

    def draw(self, draw: int) -> Groups:
        """Sample and grade the stream's next questions; `draw` counts the step's draws, from 0."""
        scoring, references = Scoring(self.tokenizer, self.pool), self.train_set.references

        def grade(row: int, question: int, tokens: Sequence[int]) -> None:
            scoring.submit(row, tokens, references[question])

        with self.observer.phase("rollout"):
            rows, rollouts = self.source.draw(self.step, draw, grade)
        # What of the grading is left once the last response is finished.
        with self.observer.phase("reward"):
            group_size = self.source.sampling.group_size
            rewards = scoring.rewards(len(rows), group_size, self.config.rewards, self.actor.grid.world)
        return Groups(rows, rollouts, rewards)

    def score_tokens(self, rollouts: Rollouts) -> tuple[TokenInputs, dict[str, float]]:
        """What must be known of each response token before the update, and mismatch/* where that tells it."""
        config, temperature = self.config, self.config.rollout.temperature
        ref = None
        if self.reference is not None:
            with self.observer.phase("logprobs"), self.reference.in_place():
                ref = self.actor.logprobs(rollouts, temperature)
        if config.actor.old_logprobs == "rollout":
            return TokenInputs(rollouts.rollout_logprobs, ref), {}
        # With one mini-batch the policy has not moved yet: the update's own log-probs are the old ones.
        if config.actor.mini_batches == 1 and not needs_old_logprobs(config.loss, config.mismatch):
            return TokenInputs(ref_logprobs=ref), {}
        with self.observer.phase("logprobs"):
            old = self.actor.logprobs(rollouts, temperature)
        metrics = self.measure_mismatch(rollouts.rollout_logprobs, old)
        correction = correct_mismatch(rollouts.rollout_logprobs, old, rollouts.response_lengths, config.mismatch)
        return TokenInputs(old, ref, correction.weights, correction.keep), metrics | correction.metrics

    def measure_mismatch(self, rollout_logprobs: Tensor, trainer_logprobs: Tensor) -> dict[str, float]:
        """mismatch/* of two flat tensors of log-probs; raises RunError, on every rank alike, where it is more than the
        run accepts."""
        metrics = mismatch_sums(rollout_logprobs, trainer_logprobs).metrics()
        limit, mean = self.config.mismatch.abort_above, metrics["mismatch/logprob_abs_mean"]
        # "not <=": a mismatch of NaN is one as well.
        if limit and not mean <= limit:
            raise RunError(
                f"step {self.step}: the log-probs of trainer and rollout engine differ by {mean:.3g} nats a token "
                f"(at most {metrics['mismatch/logprob_abs_max']:.3g}), more than mismatch.abort_above = {limit:g}; the "
                "last checkpoint is as it was: find the cause with bridge.verify = golden, or raise "
                "mismatch.abort_above"
            )
        return metrics

    def measure_from_update(self, rollouts: Rollouts, update: UpdateOutputs) -> dict[str, float]:
        """mismatch/* of the first mini-batch: the policy has moved before the log-probs of the later ones."""
        num = update.num_tokens_before
        return self.measure_mismatch(rollouts.rollout_logprobs[:num], update.logprobs[:num])

    def shape(self, batch: Groups, tokens: TokenInputs) -> Tensor:
        """float64 [P, G]: the rewards that advantages are made of."""
        config = self.config
        rewards, longest = batch.rewards, config.rollout.max_response_tokens
        shaped = shaped_rewards(rewards.matrix, batch.lengths, rewards.formatted, config.rewards, longest)
        if config.loss.kl_coefficient and config.loss.kl_in == "reward":
            lengths = batch.rollouts.response_lengths
            shaped = kl_penalty(shaped, tokens.old_logprobs, tokens.ref_logprobs, lengths, config.loss)
        return shaped

    def bundle_generator(self) -> torch.Generator:
        """The step's own: bundles need no state in the checkpoint."""
        return torch.Generator().manual_seed(sample_seeds(self.config.run.seed, self.step, 1, "bundles")[0])

    def update(self, rollouts: Rollouts, advantages: Tensor, tokens: TokenInputs) -> UpdateOutputs:
        """The step's optimizer steps; says it where some were skipped."""
        config = self.config
        outputs = self.actor.update(
            rollouts, advantages.flatten(), tokens, config.loss, config.rollout.temperature,
            config.rollout.max_response_tokens,
            num_optimizer_steps_total=config.run.steps * config.actor.mini_batches,
        )  # fmt: skip
        num_skipped = int(outputs.metrics["actor/skipped_steps"])
        if num_skipped:
            self.observer.log(
                f"step {self.step}: {num_skipped} of {config.actor.mini_batches} optimizer steps skipped, their "
                "gradients were not finite"
            )
        return outputs

    def rollout_metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """rollout/* of all that was sampled."""
        return {
            "rollout/response_length": float(rollouts.response_lengths.double().mean()),
            "rollout/truncated": float((~rollouts.finished).double().mean()),
            "rollout/tokens_per_second": float(rollouts.response_lengths.sum()) / self.observer.seconds("rollout"),
            **staleness_metrics(self.step, rollouts),
        }

    def source_metrics(self, drawn: Groups) -> dict[str, float]:
        """reward/<source>/* of all that was sampled, where the questions are of more than one data source."""
        return mean_by_source(drawn.rewards, [self.train_set.references[row].source for row in drawn.rows])

    def update_speed(self, rollouts: Rollouts) -> dict[str, float]:
        """perf/* of the step's optimizer steps, which saw each sequence once."""
        grid = self.actor.grid
        return update_metrics(
            ModelFlops.from_hf_config(self.actor.hf_config),
            rollouts.lengths.tolist(),
            num_targets=int(rollouts.response_lengths.sum()),
            seconds=self.observer.seconds("update"),
            num_ranks=grid.world.size(),
            peak=peak_flops(grid.device, getattr(torch, self.config.model.dtype)),
        )

    def warn_without_signal(self, metrics: dict[str, float]) -> None:
        """Say it when a step has nothing to learn from."""
        complaint = without_signal(metrics, self.config.algorithm)
        if complaint:
            self.observer.log(f"step {self.step}: {complaint}")

    def sample_rows(self, batch: Groups, shaped: Tensor, advantages: Tensor, num: int) -> list[dict[str, Any]]:
        """The responses to the step's first `num` questions, as a person would read them."""
        first = batch.select(range(min(num, len(batch.rows))))
        group_size = shaped.size(1)
        texts = self.tokenizer.batch_decode(first.rollouts.responses(), skip_special_tokens=True)
        return [
            {
                "problem": self.train_set.questions[first.rows[row // group_size]].problem,
                "expected_answer": self.train_set.questions[first.rows[row // group_size]].expected_answer,
                "response": text,
                "reward": float(first.rewards.matrix.flatten()[row]),
                "shaped_reward": float(shaped.flatten()[row]),
                "finished": bool(first.rollouts.finished[row]),
                "advantage": float(advantages.flatten()[row]),
            }
            for row, text in enumerate(texts)
        ]

    def evaluate(self) -> dict[str, float]:
        """pass@k on the held-out questions and the further sets."""
        metrics = {}
        with self.observer.phase("evaluation"):
            for name, questions in {"heldout": self.held_out, **self.evaluation_sets}.items():
                metrics |= self.evaluate_set(name, questions)
        return metrics

    def evaluate_set(self, name: str, questions: EncodedQuestions) -> dict[str, float]:
        """pass@k of one set; always with the same seeds, so that evaluations compare."""
        config = self.config.evaluation
        sampling = replace(self.source.sampling, group_size=config.num_samples, temperature=config.temperature)
        seeds = sample_seeds(self.config.run.seed, 0, len(questions.prompts), "evaluation")
        return evaluate(
            self.engine, questions.prompts, questions.references, sampling, seeds, config, self.tokenizer, self.pool,
            self.config.rewards, self.actor.grid.world, name,
        )  # fmt: skip

    def save(self, metrics: dict[str, float]) -> None:
        """A checkpoint of everything that the next step depends on, with what an evaluation of the step has shown.

        The rollout engine has no state in it, since what it samples depends on weights, prompts and seeds only; of
        responses under way there is what has come."""
        # Here already: meanwhile more of them come.
        self.saver.wait()
        state = {"step": self.step, "stream": self.source.state_dict(), "objective": self.objective.state_dict()}
        shown = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        self.saver.save(self.step, self.actor, state, shown, self.source.under_way())

    def restore(self, state: dict[str, Any], under_way: Mapping[str, Any]) -> None:
        """Go on from `save`'s state; the actor has loaded its own part. A data position of None starts anew.
        `under_way`: what this rank had of the next steps' rollouts, or nothing."""
        self.step = state["step"]
        if state["stream"] is not None:
            self.source.load_state_dict(state["stream"], under_way)
        self.objective.load_state_dict(state["objective"])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
