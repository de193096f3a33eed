"""Which of the ranks that hold a number gives it to a rollout rank: itself, one of its node, else all in turn.

The ranks that hold a part of a tensor are `first + period * j`, j < count: the data- and context-parallel replicas of a
tensor-parallel rank (period tp), all ranks of a stage (1), or the ranks with the same part of an expert (ep * etp). So
nothing is searched.
"""

from dataclasses import dataclass

import numpy as np

from megatron_riskpo.resharding.layouts import ActorLayout, RolloutLayout
from megatron_riskpo.resharding.pieces import Model


def owner_steps(model: Model, actor: ActorLayout) -> np.ndarray:
    """int64 [pieces]: distance of the ranks that hold the same part of a piece."""
    steps = [p.num_shards(actor) * (actor.ep if p.is_expert else 1) for p in model.pieces]
    return np.array(steps, dtype=np.int64)


@dataclass(frozen=True)
class Candidates:
    """Arrays that broadcast. The source is the destination itself where `is_own`, else the owner `first + step * j`
    with j = lowest + key % count."""

    is_own: np.ndarray
    lowest: np.ndarray
    count: np.ndarray

    def choose(self, destination: np.ndarray, key: np.ndarray, first: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Global ranks; neighbouring keys take neighbouring owners, so that all have equally much to do."""
        return np.where(self.is_own, destination, first + step * (self.lowest + key % self.count))


def candidates(
    destination: np.ndarray, first: np.ndarray, step: np.ndarray, stage_size: int, node_size: int
) -> Candidates:
    """The owners to choose from: first is the lowest owner, a stage has stage_size / step of them."""
    count = stage_size // step
    distance = destination - first
    is_own = (distance >= 0) & (distance < step * count) & (distance % step == 0)
    node = destination // node_size * node_size
    low = np.clip(-((first - node) // step), 0, count)
    high = np.clip(-((first - node - node_size) // step), 0, count)
    is_near = high > low
    return Candidates(is_own, np.where(is_near, low, 0), np.where(is_near, high - low, count))


def takes_last_copy(destination: np.ndarray, replica: np.ndarray, actor: ActorLayout, node_size: int) -> np.ndarray:
    """Of a tied embedding: whether a rollout rank takes it from the last stage rather than from the first."""
    last = actor.world_size - actor.stage_size
    node = destination // node_size * node_size
    in_first, in_last = destination < actor.stage_size, (destination >= last) & (destination < actor.world_size)
    near_first = node < actor.stage_size
    near_last = (node < actor.world_size) & (node + node_size > last)
    by_node = np.where(near_first == near_last, replica % 2 == 1, near_last)
    return np.where(in_first, False, np.where(in_last, True, by_node))


def busiest_source(step: int, stage: int, actor: ActorLayout, rollout: RolloutLayout, node_size: int) -> int:
    """Of a tensor whose owners are `step` apart: the most rollout ranks of one tensor-parallel rank that one owner
    serves in one round (its own not counted), at most. In a round those are at a stage that have begun at the same
    one."""
    replica = np.arange(rollout.replicas)
    tp_rank = np.arange(rollout.tp)[:, None]
    first = stage * actor.stage_size + np.arange(step)[:, None, None]
    destination = rollout.rank(0, 0) + tp_rank + replica * rollout.tp
    group = rollout.group(actor, replica, tp_rank)
    found = candidates(destination, first, np.array(step), actor.stage_size, node_size)
    source = found.choose(destination, group, first, np.array(step))
    bins = ((source - stage * actor.stage_size) * rollout.tp + tp_rank) * actor.pp + rollout.first_stage(actor, group)
    is_near = np.broadcast_to(found.count < actor.stage_size // step, source.shape)
    # The next tensor is the next owner's, of each node and of the stage: two turns that may meet anywhere.
    kinds = (~found.is_own & is_near, ~found.is_own & ~is_near)
    num_bins = actor.stage_size * rollout.tp * actor.pp
    counts = np.stack([np.bincount(bins[chosen], minlength=num_bins).reshape(-1, actor.pp) for chosen in kinds])
    return int(counts.max(axis=1).sum(axis=0).max())
