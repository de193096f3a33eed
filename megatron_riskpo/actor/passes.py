"""Running packed micro-batches through Megatron's schedules, and collecting what comes out on the last stage.

Every rank is handed the same whole batch and the same plan, so that any rank knows which rank computes what and
results can be put back in batch order without messages about it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_riskpo.actor.model import score_micro_batch
from megatron_riskpo.actor.packing import MicroBatch, pack
from megatron_riskpo.actor.sequence_split import SequenceSplit
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.rollout.types import Rollouts

Plan = list[list[list[int]]]
"""plan[dp_rank][micro_batch] = rows of the batch."""

MicroBatchLoss = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(micro-batch, log-probs [n], entropies [n]) -> this micro-batch's contribution to the loss, and to the metrics."""


def run_passes(
    model: Sequence[nn.Module], rollouts: Rollouts, micro_batches: Sequence[Sequence[int]], temperature: float,
    split: SequenceSplit, device: torch.device, loss: MicroBatchLoss | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Forward (and, with a loss, backward) over this rank's micro-batches; `model`: its virtual pipeline stages.

    Returns one dict a micro-batch on the last pipeline stage (nothing on others): `logprobs` float32 [n], detached,
    and the loss's metrics.
    """

    def forward_step(batches: Iterator[MicroBatch], stage: nn.Module) -> tuple[Any, Callable]:
        batch = next(batches)
        output = score_micro_batch(stage, batch, temperature)

        def loss_function(scores: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
            logprobs, entropies = scores
            collected: dict[str, Any] = {"logprobs": logprobs.detach()}
            if loss is None:
                return logprobs.sum(), torch.tensor(1), collected
            contribution, metrics = loss(batch, logprobs, entropies)
            return contribution, torch.tensor(1), collected | metrics

        return output, loss_function

    def batches() -> Iterator[MicroBatch]:
        # One by one: what a pack brings along (attention's masks) goes when its backward pass is done.
        return (pack(rollouts, rows, split, device) for rows in micro_batches)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        # Every virtual stage goes through all micro-batches.
        data_iterator=[batches() for _ in model],
        model=list(model),
        num_microbatches=len(micro_batches),
        # Not looked at: pipeline stages tell each other the shapes.
        seq_length=1,
        micro_batch_size=1,
        forward_only=loss is None,
    )


def gather_logprobs(mine: Sequence[Tensor], plan: Plan, rollouts: Rollouts, grid: RankGrid) -> Tensor:
    """The log-probs of every response token, float32 [num_response_tokens] in batch order, on every rank.

    `mine` are this rank's micro-batches' (empty but on the last stage).
    """
    rows_of_rank = [[row for rows in micro_batches for row in rows] for micro_batches in plan]
    lengths = rollouts.response_lengths
    counts = [int(lengths[rows].sum()) for rows in rows_of_rank]
    if grid.is_last_stage:
        flat = torch.cat(list(mine))
        padded = torch.nn.functional.pad(flat, (0, max(counts) - flat.numel()))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=grid.dp)
        gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    else:
        gathered = torch.empty(sum(counts), dtype=torch.float32, device=grid.device)
    if grid.pp.size() > 1:
        dist.broadcast(gathered, src=dist.get_global_rank(grid.pp, grid.pp.size() - 1), group=grid.pp)
    return _in_batch_order(gathered.cpu(), [row for rows in rows_of_rank for row in rows], lengths)


def _in_batch_order(values: Tensor, rows: Sequence[int], lengths: Tensor) -> Tensor:
    pieces = values.split(lengths[list(rows)].tolist())
    by_row = dict(zip(rows, pieces, strict=True))
    return torch.cat([by_row[row] for row in range(len(rows))])


def sum_metrics(mine: Sequence[dict[str, Tensor]], grid: RankGrid) -> dict[str, float]:
    """Sums of the micro-batches' metric contributions over the last stage's data-parallel ranks, on every rank."""
    totals: list[Any] = [None]
    if grid.is_last_stage:
        names = sorted(mine[0])
        values = torch.stack([torch.stack([m[name].double() for name in names]) for m in mine]).sum(0)
        dist.all_reduce(values, group=grid.dp)
        totals = [dict(zip(names, values.tolist(), strict=True))]
    if grid.pp.size() > 1:
        dist.broadcast_object_list(totals, src=dist.get_global_rank(grid.pp, grid.pp.size() - 1), group=grid.pp)
    return totals[0]
