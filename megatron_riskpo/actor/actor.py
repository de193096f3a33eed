"""The actor: a Megatron model that scores rollouts, learns from them, and gives its weights away."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_riskpo.actor.gradient_health import GuardedOptimizer
from megatron_riskpo.actor.micro_batches import WorkModel, plan_micro_batches
from megatron_riskpo.actor.model import PolicyModel, build_policy_model, named_parameters
from megatron_riskpo.actor.optimizer import build_optimizer, learning_rate, set_learning_rate
from megatron_riskpo.actor.optimizer_offload import OffloadedState
from megatron_riskpo.actor.packing import MicroBatch
from megatron_riskpo.actor.passes import MicroBatchLoss, gather_logprobs, run_passes, sum_metrics
from megatron_riskpo.actor.sequence_split import SequenceSplit
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.covariance import covariant_tokens
from megatron_riskpo.algorithms.policy_loss import loss_normalizer, policy_loss
from megatron_riskpo.algorithms.segments import count_kept
from megatron_riskpo.algorithms.surrogates import SURROGATES
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.checkpoint.hf import load_hf_weights
from megatron_riskpo.checkpoint.hf_folder import save_hf
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.resharding.export import ExportItem, export_weights, plan_export
from megatron_riskpo.rollout.types import Rollouts


@dataclass(frozen=True)
class UpdateOutputs:
    """What one pass of updates did."""

    metrics: dict[str, float]
    """actor/*, the same on every rank: means over the mini-batches whose step was taken (over all, so nan or inf, where
    none was); actor/skipped_steps is how many were not."""
    logprobs: Tensor
    """float32 [num_response_tokens]: each response token's log-prob just before its mini-batch's optimizer step."""
    num_tokens_before: int
    """Of so many first tokens, the first mini-batch's, these are the log-probs before the whole update."""


class Actor:
    """One rank of the actor. Every method is collective: all ranks call it with the same arguments."""

    def __init__(
        self, hf_config: dict[str, Any], config: ActorConfig, optimizer: OptimizerConfig, dtype: torch.dtype,
        grid: RankGrid, model_dir: str | Path | None = None,
    ) -> None:  # fmt: skip
        """Weights come from the Hugging Face folder model_dir, or are random without one."""
        self.hf_config = hf_config
        self.config = config
        self.optimizer_config = optimizer
        self.grid = grid
        self.family, self.shape = family_of(hf_config), shape_of(hf_config)
        self.chunks = build_policy_model(hf_config, config, dtype, grid)
        for chunk in self.chunks:
            chunk.to(grid.device)
        if model_dir is not None:
            load_hf_weights(self.chunks, model_dir, self.family, self.shape, grid)
        self.model = wrap_for_training(self.chunks, config, dtype)
        self.optimizer = build_optimizer(self.model, optimizer, config, dtype)
        self.chunks[0].config.grad_scale_func = self.optimizer.scale_loss
        self._split = SequenceSplit(config.cp, grid.cp.rank(), config.tp if config.sequence_parallel else 1)
        self._offloaded = OffloadedState(self.optimizer) if config.offload_optimizer else None
        self.guarded = GuardedOptimizer(self.optimizer, optimizer.max_skipped_steps, grid)
        self.num_optimizer_steps = 0
        self._release_gradients()

    @classmethod
    def from_hf(cls, model_dir: str | Path, config: ActorConfig, optimizer: OptimizerConfig, dtype: torch.dtype,
                grid: RankGrid) -> "Actor":  # fmt: skip
        """The actor of a Hugging Face model folder."""
        return cls(load_model_config(model_dir), config, optimizer, dtype, grid, model_dir)

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """float32 [num_response_tokens]: log-prob of each response token, on every rank."""
        plan = self._plan(rollouts)
        for chunk in self.model:
            chunk.eval()
        results = self._run(rollouts, plan, temperature, loss=None)
        for chunk in self.model:
            chunk.train()
        return gather_logprobs([r["logprobs"] for r in results], plan, rollouts, self.grid)

    def update(
        self, rollouts: Rollouts, advantages: Tensor, tokens: TokenInputs, loss: PolicyLossConfig, temperature: float,
        max_response_tokens: int, num_optimizer_steps_total: int,
    ) -> UpdateOutputs:  # fmt: skip
        """`config.mini_batches` optimizer steps on the given responses.

        advantages [N] float64, one a response. tokens: values of all response tokens, on the CPU; without old log-probs
        each mini-batch's own are taken (right for one mini-batch, and saves a forward pass), `penalised` is found here.
        max_response_tokens is the constant of one aggregation; num_optimizer_steps_total the length of the
        learning-rate schedule.
        """
        logprob_pieces: list[Tensor] = []
        metrics: list[dict[str, float]] = []
        for chunk in torch.arange(rollouts.num_sequences).chunk(self.config.mini_batches):
            rows = chunk.tolist()
            mini_batch = rollouts.select(rows)
            inputs = tokens.select(rollouts.response_lengths, rows)
            micro_loss = policy_micro_loss(
                mini_batch, advantages[rows], inputs, loss, max_response_tokens, self.grid.device
            )
            logprobs, summed = self.train_step(mini_batch, micro_loss, temperature, num_optimizer_steps_total)
            logprob_pieces.append(logprobs)
            metrics.append(summed)
        return UpdateOutputs(summarize_steps(metrics), torch.cat(logprob_pieces), logprob_pieces[0].numel())

    def train_step(
        self, rollouts: Rollouts, loss: MicroBatchLoss, temperature: float, num_optimizer_steps_total: int
    ) -> tuple[Tensor, dict[str, float]]:
        """One optimizer step on a mini-batch, or none if its gradients are not finite: its log-probs before the step,
        and its metrics. Raises RunError, on every rank, after too many steps without finite gradients."""
        plan = self._plan(rollouts)
        for chunk in self.model:
            if self.config.offload_gradients:
                chunk.restore_grad_buffers(synchronize=False)
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(rollouts, plan, temperature, loss)
        set_learning_rate(
            self.optimizer, learning_rate(self.optimizer_config, self.num_optimizer_steps, num_optimizer_steps_total)
        )
        with self.optimizer_state():
            grad_norm, taken = self.guarded.step(self.num_optimizer_steps, named_parameters(self.chunks))
        self._release_gradients()
        # A skipped step counts as well: the learning rate is a function of the RL step, whatever became of it.
        self.num_optimizer_steps += 1
        logprobs = gather_logprobs([r.pop("logprobs") for r in results], plan, rollouts, self.grid)
        health = {"actor/grad_norm": grad_norm, "actor/skipped_steps": float(not taken)}
        return logprobs, sum_metrics(results, self.grid) | health

    def _release_gradients(self) -> None:
        """With actor.offload_gradients: their tensors stay, without memory, until the next step."""
        if self.config.offload_gradients:
            for chunk in self.model:
                chunk.offload_grad_buffers(synchronize=self.grid.device.type == "cuda")

    def optimizer_state(self) -> AbstractContextManager[None]:
        """What has to be around every use of the optimizer's state: an offloaded one is on the device in the body."""
        return self._offloaded.on_device() if self._offloaded is not None else nullcontext()

    @cached_property
    def _export_plan(self) -> list[ExportItem]:
        """Which stage has what; made by the first export, since it takes all stages to make."""
        return plan_export(self.chunks, self.family, self.shape, self.grid)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) pairs, on every rank; exhaust it, the gathers are collective."""
        return export_weights(self.chunks, self._export_plan, self.shape, self.grid)

    def save_hf(self, target: str | Path, add_files: Callable[[Path], None]) -> None:
        """Write a Hugging Face folder; `add_files` puts the tokenizer into it (on the writing rank)."""
        save_hf(target, self.export_weights(), self.hf_config, add_files, is_writer=self.grid.rank == 0)

    def _plan(self, rollouts: Rollouts) -> list[list[list[int]]]:
        work = WorkModel.from_hf_config(self.hf_config)
        multiple = self._split.sequence_multiple
        lengths = -(-rollouts.lengths // multiple) * multiple
        # The interleaved schedule goes through micro-batches in groups of pp.
        group = self.config.pp if self.config.vp > 1 else 1
        max_tokens = self.config.micro_batch_tokens * self.config.cp
        return plan_micro_batches(lengths.tolist(), self.grid.dp.size(), max_tokens, work, group)

    def _run(
        self, rollouts: Rollouts, plan: Sequence[Sequence[Sequence[int]]], temperature: float,
        loss: MicroBatchLoss | None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        micro_batches = plan[self.grid.dp.rank()]
        return run_passes(self.model, rollouts, micro_batches, temperature, self._split, self.grid.device, loss)


def wrap_for_training(
    chunks: Sequence[PolicyModel], config: ActorConfig, dtype: torch.dtype
) -> list[DistributedDataParallel]:
    """Each chunk with Megatron's gradient buffers, gradients summed over the ranks that hold the same weights."""
    transformer = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.distributed_optimizer
    )
    model = [
        DistributedDataParallel(
            transformer,
            ddp,
            Float16Module(transformer, chunk) if dtype == torch.bfloat16 else chunk,
            # As Megatron does: only the first chunk's gradients can be reduced while others still compute.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in model:
        chunk.broadcast_params()
    # Contributions are normalised already, so gradients are summed: no division by a number of tokens.
    transformer.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(
        model, None, **kwargs
    )
    return model


def summarize_steps(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Several optimizer steps' metrics as one's: UpdateOutputs.metrics says how."""
    taken = [m for m in metrics if not m["actor/skipped_steps"]] or metrics
    means = {name: sum(m[name] for m in taken) / len(taken) for name in taken[0]}
    return means | {"actor/skipped_steps": sum(m["actor/skipped_steps"] for m in metrics)}


def policy_micro_loss(
    mini_batch: Rollouts, advantages: Tensor, tokens: TokenInputs, config: PolicyLossConfig, max_response_tokens: int,
    device: torch.device,
) -> MicroBatchLoss:  # fmt: skip
    """The policy loss of a mini-batch, as a function of one of its micro-batches.

    What depends on the whole mini-batch, its denominators and the tokens to hold back, is settled here, before it is
    cut.
    """
    lengths = mini_batch.response_lengths
    if SURROGATES[config.kind].needs_penalised:
        penalised = covariant_tokens(tokens.old_logprobs, advantages, lengths, config.cov_fraction, tokens.keep)
        tokens = dataclasses.replace(tokens, penalised=penalised)
    kept_lengths = count_kept(lengths, tokens.keep)
    normalizer = loss_normalizer(config, kept_lengths, max_response_tokens)
    num_kept, num_tokens = float(kept_lengths.sum()), float(lengths.sum())

    def loss(batch: MicroBatch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = policy_loss(
            logprobs, advantages[list(batch.rows)].to(device), batch.response_lengths, config, normalizer,
            tokens.select(lengths, batch.rows).to(device), entropies if config.entropy_coefficient else None, num_kept,
        )  # fmt: skip
        # However the loss aggregates, and whatever is masked: what the policy's entropy is.
        return outputs.loss, outputs.metrics | {"actor/entropy": entropies.detach().sum() / num_tokens}

    return loss


def supervised_loss(mini_batch: Rollouts) -> MicroBatchLoss:
    """Mean negative log-prob of the response tokens of a mini-batch of solved examples."""
    num_tokens = float(mini_batch.response_lengths.sum())

    def loss(batch: MicroBatch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        contribution = -logprobs.sum() / num_tokens
        return contribution, {"sft/loss": contribution.detach()}

    return loss
