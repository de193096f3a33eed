"""One rank's part of a push: what it sends to whom and what it gets from whom, by formulas, for any world size.

A rank's plan costs time in its own transfers only. Both sides of a transfer compute it independently and in the same
order, so that a message needs no description.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_riskpo.resharding.pieces import module_numbers, source_width, target_rows
from megatron_riskpo.resharding.schedule import BridgeLayout, Schedule, make_schedule, target_intervals
from megatron_riskpo.resharding.sources import candidates, owner_steps, takes_last_copy
from megatron_riskpo.resharding.stream import Stream

TRANSFER = np.dtype(
    [
        ("round", np.int64),
        ("source", np.int64),
        ("destination", np.int64),
        ("entry", np.int64),  # in the source stage's stream
        ("piece", np.int64),
        ("layer", np.int64),
        ("expert", np.int64),
        ("start", np.int64),  # [start, stop) of the Hugging Face tensor along the dimension that is cut over ranks
        ("stop", np.int64),
        ("low", np.int64),  # [low, high) along the other
        ("high", np.int64),
    ]
)


@dataclass(frozen=True, eq=False)
class RankPlan:
    """Equal and hashed by content: what is moved where, not how it was found."""

    rank: int
    layout: BridgeLayout
    sends: np.ndarray
    """TRANSFER [n], to other ranks, by round, destination, place in the stream."""
    receives: np.ndarray
    """TRANSFER [n], by round, source, place in the stream; from this rank itself too, where it has what it needs."""

    @property
    def digest(self) -> str:
        """SHA-256 of the transfers."""
        digest = hashlib.sha256(f"{self.rank} {self.layout.item_size}".encode())
        digest.update(self.sends.tobytes())
        digest.update(self.receives.tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankPlan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def rounds(self) -> np.ndarray:
        """The numbers of the rounds in which this rank has something to do, ascending."""
        return np.unique(np.concatenate([self.sends["round"], self.receives["round"]]))

    @property
    def remote(self) -> np.ndarray:
        """Of the receives, those from other ranks."""
        return self.receives[self.receives["source"] != self.rank]

    def num_bytes(self, transfers: np.ndarray) -> int:
        """Together."""
        return int(transfer_items(transfers).sum()) * self.layout.item_size

    @property
    def peak_round_bytes(self) -> int:
        """Most bytes that this rank sends and receives in a round."""
        return int(self._round_bytes().max(initial=0))

    @property
    def bucket_bytes(self) -> int:
        """Of the two buckets that take turns, each as large as its largest round."""
        return sum(int(self._round_bytes()[first::2].max(initial=0)) for first in (0, 1))

    def _round_bytes(self) -> np.ndarray:
        """int64 [rounds]"""
        per_round = np.zeros(int(self.rounds.max(initial=-1)) + 1, np.int64)
        for transfers in (self.sends, self.remote):
            np.add.at(per_round, transfers["round"], transfer_items(transfers))
        return per_round[self.rounds] * self.layout.item_size

    @property
    def peak_open_bytes(self) -> int:
        """Most memory of vLLM's modules that have some of their slices and not all: each is held whole from its first
        to its last, and slices come round by round, in the order of the stream."""
        layout, order = self.layout, np.lexsort((self.receives["entry"], self.receives["round"]))
        receives, tp = self.receives[order], layout.rollout.tp
        modules = module_numbers(layout.model)[receives["piece"]] * (layout.model.shape.num_layers + 1)
        _, first, index = np.unique(modules + receives["layer"], return_index=True, return_inverse=True)
        items = np.bincount(index, transfer_items(receives)).astype(np.int64)
        last = np.zeros(len(first), np.int64)
        np.maximum.at(last, index, np.arange(len(receives)))
        # Of a vocabulary also rows that pad it.
        padded = np.array([target_rows(p, tp) * p.width if p.rule.is_vocab else 0 for p in layout.model.pieces])
        items = np.maximum(items, padded[receives["piece"][first]])
        change = np.zeros(len(receives) + 1, np.int64)
        np.add.at(change, first, items)
        np.add.at(change, last + 1, -items)
        return max(int(np.cumsum(change).max()), int(padded.max()) if len(first) else 0) * layout.item_size


def transfer_items(transfers: np.ndarray) -> np.ndarray:
    """int64 [n]: numbers in each transfer."""
    return (transfers["stop"] - transfers["start"]) * (transfers["high"] - transfers["low"])


@lru_cache(maxsize=256)
def plan_rank(layout: BridgeLayout, rank: int) -> RankPlan:
    """The plan of one global rank; raises UsageError for layouts that do not fit the model."""
    schedule = make_schedule(layout)
    sends, receives = _sends(layout, schedule, rank), _receives(layout, schedule, rank)
    sends = sends[np.lexsort((sends["entry"], sends["destination"], sends["round"]))]
    receives = receives[np.lexsort((receives["start"], receives["entry"], receives["source"], receives["round"]))]
    return RankPlan(rank, layout, sends, receives)


def _receives(layout: BridgeLayout, schedule: Schedule, rank: int) -> np.ndarray:
    place = layout.rollout.place(rank)
    if place is None:
        return np.empty(0, TRANSFER)
    intervals = target_intervals(layout, place[1])
    found = []
    for stage, stream in enumerate(schedule.streams):
        start, stop = intervals.start[stream.piece], intervals.stop[stream.piece]
        wanted = (stop > start) & intervals.holds(stream.expert) & _is_taken(layout, stream, stage, rank, place[0])
        entry, shard, start, stop = _split_over_shards(layout, stream, np.flatnonzero(wanted), start, stop)
        group = layout.rollout.group(layout.actor, *place)
        source = _chosen_source(layout, schedule, stage, entry, shard, np.array(rank), group)
        number = schedule.round_number(stage, layout.rollout.first_stage(layout.actor, group), entry)
        found.append(_transfers(stream, entry, source, rank, number, start, stop))
    return np.concatenate(found)


def _is_taken(
    layout: BridgeLayout, stream: Stream, stage: int, rank: int | np.ndarray, replica: int | np.ndarray
) -> np.ndarray:
    """Of a tied embedding one of the two copies: bool, [entries] for one rank, [ranks, entries] for several."""
    everything = np.ones((*np.shape(rank), len(stream)), dtype=bool)
    if layout.actor.pp == 1 or not layout.model.shape.tied_embeddings:
        return everything
    last = takes_last_copy(np.asarray(rank), np.asarray(replica), layout.actor, layout.node_size)
    taken = last if stage == layout.actor.pp - 1 else ~last
    return np.where(stream.piece == 0, taken[..., None], everything)


def _split_over_shards(
    layout: BridgeLayout, stream: Stream, entry: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The wanted entries' intervals cut where the parts of the actor's ranks meet: entry, shard, start, stop."""
    widths = _widths(layout)[stream.piece[entry]]
    start, stop = start[entry], stop[entry]
    lowest, num_shards = start // widths, (stop - 1) // widths - start // widths + 1
    index = np.repeat(np.arange(len(entry)), num_shards)
    shard = lowest[index] + np.arange(len(index)) - np.repeat(np.cumsum(num_shards) - num_shards, num_shards)
    begin = np.maximum(start[index], shard * widths[index])
    end = np.minimum(stop[index], (shard + 1) * widths[index])
    return entry[index], shard, begin, end


def _first_owner(layout: BridgeLayout, stream: Stream, entry: np.ndarray, shard: np.ndarray) -> np.ndarray:
    """Distance of the lowest owner from the first rank of its stage."""
    owner = layout.actor.expert_owner(stream.expert[entry], layout.model.shape.num_experts)
    return np.where(owner >= 0, owner * layout.actor.etp, 0) + shard


def _chosen_source(
    layout: BridgeLayout, schedule: Schedule, stage: int, entry: np.ndarray, shard: np.ndarray,
    destination: np.ndarray, group: np.ndarray,
) -> np.ndarray:  # fmt: skip
    stream = schedule.streams[stage]
    step = owner_steps(layout.model, layout.actor)[stream.piece[entry]]
    first = stage * layout.actor.stage_size + _first_owner(layout, stream, entry, shard)
    found = candidates(destination, first, step, layout.actor.stage_size, layout.node_size)
    return found.choose(destination, group + schedule.turns[stage][entry], first, step)


def _sends(layout: BridgeLayout, schedule: Schedule, rank: int) -> np.ndarray:
    if rank >= layout.actor.world_size:
        return np.empty(0, TRANSFER)
    stage = rank // layout.actor.stage_size
    stream = schedule.streams[stage]
    entry, start, stop = _held(layout, stream, rank)
    replica = np.arange(layout.rollout.replicas)[:, None]
    found = []
    for tp_rank in range(layout.rollout.tp):
        intervals = target_intervals(layout, tp_rank)
        begin = np.maximum(start, intervals.start[stream.piece[entry]])
        end = np.minimum(stop, intervals.stop[stream.piece[entry]])
        wanted = np.flatnonzero((end > begin) & intervals.holds(stream.expert[entry]))
        destination = layout.rollout.rank(0, tp_rank) + replica * layout.rollout.tp
        shard = _held_shards(layout, rank)[stream.piece[entry[wanted]]]
        group = layout.rollout.group(layout.actor, replica, tp_rank)
        source = _chosen_source(layout, schedule, stage, entry[wanted], shard, destination, group)
        taken = _is_taken(layout, stream, stage, destination[:, 0], replica[:, 0])[:, entry[wanted]]
        first_stage = layout.rollout.first_stage(layout.actor, group)
        row, column = np.nonzero((source == rank) & (destination != rank) & taken)
        index = wanted[column]
        number = schedule.round_number(stage, first_stage[row, 0], entry[index])
        found.append(_transfers(stream, entry[index], rank, destination[row, 0], number, begin[index], end[index]))
    return np.concatenate(found)


def _widths(layout: BridgeLayout) -> np.ndarray:
    """int64 [pieces]: indices of the cut dimension on an actor rank."""
    return np.array([source_width(piece, layout.model.shape, layout.actor) for piece in layout.model.pieces])


def _held_shards(layout: BridgeLayout, rank: int) -> np.ndarray:
    """int64 [pieces]: which part of each piece an actor rank holds."""
    return np.array([rank % piece.num_shards(layout.actor) for piece in layout.model.pieces])


def _held(layout: BridgeLayout, stream: Stream, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries of its stage that a rank holds a part of, and the [start, stop) of that part."""
    model, actor = layout.model, layout.actor
    owner = actor.expert_owner(stream.expert, model.shape.num_experts)
    entry = np.flatnonzero((owner < 0) | (owner == rank % actor.stage_size // actor.etp % actor.ep))
    widths, lengths = _widths(layout), np.array([piece.length for piece in model.pieces])
    start = _held_shards(layout, rank) * widths
    ends = np.minimum(start + widths, lengths)
    return entry, start[stream.piece[entry]], ends[stream.piece[entry]]


def _transfers(
    stream: Stream, entry: np.ndarray, source: int | np.ndarray, destination: int | np.ndarray,
    number: np.ndarray, start: np.ndarray, stop: np.ndarray,
) -> np.ndarray:  # fmt: skip
    transfers = np.empty(len(entry), TRANSFER)
    of_stream = stream.take(entry)
    for name, value in (vars(of_stream) | {
        "round": number, "source": source, "destination": destination, "entry": entry, "start": start, "stop": stop,
    }).items():  # fmt: skip
        transfers[name] = value
    return transfers
