"""Optimizer steps that are taken with finite gradients only.

The global gradient norm is known before a parameter moves. Where it is not finite the step is left out on all ranks
alike, and weights and optimizer state stay as they are, bit for bit.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import nn

from megatron_riskpo.actor.optimizer import inner_optimizers
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.errors import RunError

NUM_NAMED = 5
"""Parameters that an error names."""


@dataclass
class GuardedOptimizer:
    """Takes an optimizer's steps, but for those with gradients that are not finite: these it skips and counts."""

    optimizer: MegatronOptimizer
    max_skipped_steps: int
    """Steps in a row that may be skipped."""
    grid: RankGrid
    num_skipped_in_a_row: int = 0
    """Not in checkpoints: a resumed run may skip as many steps again, which costs it that many steps at most."""

    def step(self, number: int, parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[float, bool]:
        """Optimizer step `number` with the gradients of DDP's buffers: the global norm before clipping, and whether
        the step was taken; collective.

        parameters: this rank's, with their names, for the error alone. Raises RunError, on every rank, for the step
        after `max_skipped_steps` skipped ones in a row if it would be skipped as well.
        """
        # Its own verdict is that of a loss scaler, which neither float32 nor bfloat16 has.
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not _finite_everywhere(norm, self.grid):
            self.num_skipped_in_a_row += 1
            if self.num_skipped_in_a_row > self.max_skipped_steps:
                raise self._error(number, norm, _spoilt_parameters(parameters, self.grid))
            return norm, False
        self.num_skipped_in_a_row = 0
        _clip(self.optimizer, norm)
        self.optimizer.step_with_ready_grads()
        return norm, True

    def _error(self, number: int, norm: float, spoilt: list[str]) -> RunError:
        if spoilt:
            shown = ", ".join(spoilt[:NUM_NAMED])
            where = f"{len(spoilt)} parameters spoilt: {shown}{', ...' * (len(spoilt) > NUM_NAMED)}"
        else:
            where = "each gradient is finite, but their norm overflows float32"
        return RunError(
            f"gradient norm is {norm} at optimizer step {number}, not finite {self.num_skipped_in_a_row} times in a "
            f"row (optimizer.max_skipped_steps = {self.max_skipped_steps}); {where}; the last checkpoint is as it was: "
            "go on from it with a larger optimizer.max_skipped_steps, or start a new run with a lower optimizer.lr"
        )


def _finite_everywhere(norm: float, grid: RankGrid) -> bool:
    """Whether all ranks' norms are finite; collective.

    Without the distributed optimizer each replica of the model takes its norm over a group of its own, and near
    overflow two groups need not round alike. One that steps alone would train another model from there on.
    """
    flag = torch.tensor([float(not math.isfinite(norm))], device=grid.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=grid.world)
    return flag.item() == 0


def _clip(optimizer: MegatronOptimizer, norm: float) -> None:
    """Scale the gradients to optimizer.clip_grad; by the norm over all chained optimizers (experts have their own)."""
    for inner in inner_optimizers(optimizer):
        parameters, limit = inner.get_parameters(), inner.config.clip_grad
        if parameters and limit > 0:
            decoupled = inner.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, limit, norm, decoupled)


def _spoilt_parameters(parameters: Iterable[tuple[str, nn.Parameter]], grid: RankGrid) -> list[str]:
    """Names of all ranks' parameters with a gradient that is not finite, nearest to the loss first; collective.

    A gradient spoils those of all earlier layers, so the cause is found where the names begin.
    """
    gradients = ((name, getattr(parameter, "main_grad", None)) for name, parameter in parameters)
    mine = [name for name, gradient in gradients if gradient is not None and not bool(gradient.isfinite().all())]
    by_rank: list[list[str]] = [[]] * grid.world.size()
    dist.all_gather_object(by_rank, mine[::-1], group=grid.world)
    # Later pipeline stages are later ranks.
    return list(dict.fromkeys(name for names in reversed(by_rank) for name in names))
