"""The batches that update.py's actor is given, packed and padded. Import only where the CPU backend is in place."""

from dataclasses import dataclass

import torch
from update_workload import Layout, Workload, pad_to_longest, padded_micro_batches

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.rollout.types import Rollouts

Plan = list[list[list[int]]]


@dataclass(frozen=True)
class Batch:
    """One way to lay the same sequences out."""

    rollouts: Rollouts
    tokens: TokenInputs
    plan: Plan | None
    """plan[data-parallel rank][micro-batch] = rows; None: the actor's own planner."""


class PlannedActor(Actor):
    """An actor that can be told its micro-batches: the project's planner never makes rectangles."""

    given_plan: Plan | None = None

    def _plan(self, rollouts: Rollouts) -> Plan:
        return self.given_plan or super()._plan(rollouts)

    def plan_of(self, batch: Batch) -> Plan:
        """The micro-batches that the batch will be cut into."""
        self.given_plan = batch.plan
        return self._plan(batch.rollouts)


def make_batch(way: str, rollouts: Rollouts, layout: Layout, workload: Workload, num_dp: int) -> Batch:
    """`way` is one of update_workload.WAYS."""
    if way == "packed":
        return Batch(rollouts, TokenInputs(), None)
    lengths = rollouts.lengths
    order = torch.arange(lengths.numel()) if way == "padded" else lengths.argsort(descending=True, stable=True)
    budget = workload.micro_batch_tokens * layout.cp
    bins = padded_micro_batches(lengths.tolist(), order.tolist(), budget, layout.multiple_of)
    longer, keep = pad_to_longest(rollouts, bins)
    return Batch(longer, TokenInputs(keep=keep), [bins[rank::num_dp] for rank in range(num_dp)])
