"""A rank's plan made ready to run: per round the messages, and where in them each slice lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megatron_riskpo.resharding.pieces import module_of
from megatron_riskpo.resharding.plan import RankPlan, transfer_items
from megatron_riskpo.resharding.slices import SourceSlice, TargetSlice, source_slice, target_slice


@dataclass(frozen=True, slots=True)
class Part:
    """One transfer."""

    offset: int
    """Of its numbers in the bucket."""
    numel: int
    source: SourceSlice
    target: TargetSlice


@dataclass(frozen=True)
class Message:
    """All that goes between two ranks in a round, one part after the other."""

    peer: int
    offset: int
    """In the bucket."""
    numel: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Arrival:
    """What comes from one rank for one module of vLLM's, in a round."""

    peer: int
    """This rank itself, where it has what it needs: copied within the rank, through no bucket."""
    first: int
    """Of the parts of the message: the first one's place."""
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Round:
    """What a rank does in a round; its bucket has room for what it sends, then for what it receives."""

    number: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    arrivals: tuple[Arrival, ...]
    """What it receives, and has itself, module after module: a module takes memory until all of it is there."""

    @property
    def numel(self) -> int:
        """Of the bucket."""
        return sum(message.numel for message in (*self.sends, *self.receives))


def make_rounds(plan: RankPlan) -> tuple[Round, ...]:
    """In the order in which they run."""
    own, remote = plan.receives[plan.receives["source"] == plan.rank], plan.remote
    rounds = []
    for number in plan.rounds:
        sends, end = _messages(plan, _of_round(plan.sends, number), "destination", 0)
        from_others, from_self = _of_round(remote, number), _of_round(own, number)
        receives, _ = _messages(plan, from_others, "source", end)
        local, _ = _messages(plan, from_self, "source", 0)
        places = np.concatenate([from_others["entry"], from_self["entry"]]).tolist()
        arrivals = _by_module([*receives, *local], places)
        rounds.append(Round(int(number), tuple(sends), tuple(receives), arrivals))
    return tuple(rounds)


def _by_module(messages: Sequence[Message], places: Sequence[int]) -> tuple[Arrival, ...]:
    """`places`, of each part, in the stage's stream, where a module's tensors follow each other."""
    found, start = [], 0
    for message in messages:
        parts = message.parts
        for _, group in groupby(range(len(parts)), key=lambda i, of=parts: module_of(of[i].target.parameter)):
            index = list(group)
            arrival = Arrival(message.peer, index[0], parts[index[0] : index[-1] + 1])
            found.append((places[start + index[0]], message.peer, arrival))
        start += len(parts)
    return tuple(arrival for *_, arrival in sorted(found, key=lambda entry: entry[:2]))


def _of_round(transfers: np.ndarray, number: int) -> np.ndarray:
    """`transfers` are sorted by round."""
    first, end = np.searchsorted(transfers["round"], [number, number + 1])
    return transfers[first:end]


def _messages(plan: RankPlan, transfers: np.ndarray, peer: str, offset: int) -> tuple[list[Message], int]:
    """One a peer, and where the last one ends."""
    messages = []
    for rank, group in groupby(range(len(transfers)), key=lambda i: int(transfers[peer][i])):
        parts, end = _parts(plan, transfers[list(group)], offset)
        messages.append(Message(rank, offset, end - offset, parts))
        offset = end
    return messages, offset


def _parts(plan: RankPlan, transfers: np.ndarray, offset: int) -> tuple[tuple[Part, ...], int]:
    ends = offset + np.cumsum(transfer_items(transfers))
    parts = []
    for transfer, end in zip(transfers, ends.tolist(), strict=True):
        parts.append(_part(plan, transfer, offset, end - offset))
        offset = end
    return tuple(parts), offset


def _part(plan: RankPlan, transfer: np.void, offset: int, numel: int) -> Part:
    place = plan.layout.rollout.place(int(transfer["destination"]))
    assert place is not None  # destinations are rollout ranks
    source = source_slice(plan.layout, int(transfer["source"]), transfer)
    return Part(offset, numel, source, target_slice(plan.layout, place[1], transfer))


def bucket_sizes(rounds: Sequence[Round]) -> list[int]:
    """Numbers in the two buckets that take turns, each as large as its largest round."""
    return [max((step.numel for step in rounds[first::2]), default=0) for first in (0, 1)]
