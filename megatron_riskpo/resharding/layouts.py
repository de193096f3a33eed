"""Who holds what: the actor's layout and the rollout engines' layout, as numbers alone."""

from dataclasses import dataclass

import numpy as np

from megatron_riskpo.config import ActorConfig
from megatron_riskpo.errors import UsageError


@dataclass(frozen=True)
class ActorLayout:
    """Megatron's grid: tensor parallel fastest, then context, data, pipeline parallel. For experts the ranks of a stage
    are counted anew: those that split an expert fastest, then those that hold different ones, then replicas."""

    world_size: int
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    first_stage_layers: int = 0
    """0: as many as the others; so is the next."""
    last_stage_layers: int = 0

    def __post_init__(self) -> None:
        if self.world_size % (self.tp * self.cp * self.pp) or self.stage_size % (self.ep * self.etp):
            raise UsageError(
                f"{self.world_size} ranks cannot be laid out as tp {self.tp} x cp {self.cp} x pp {self.pp} with ep "
                f"{self.ep} x etp {self.etp}; choose sizes whose products divide"
            )

    @classmethod
    def of(cls, actor: ActorConfig, world_size: int) -> "ActorLayout":
        """The layout that a configuration asks for."""
        names = ("tp", "pp", "vp", "cp", "ep", "etp", "first_stage_layers", "last_stage_layers")
        return cls(world_size, **{name: getattr(actor, name) for name in names})

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.world_size // self.pp

    def expert_owner(self, expert: np.ndarray, num_experts: int) -> np.ndarray:
        """The expert-parallel rank that holds each expert, dealt out in blocks; -1 for -1, which is no expert."""
        return expert // max(1, num_experts // self.ep)

    def stage_layers(self, stage: int, num_layers: int) -> np.ndarray:
        """The layers on a pipeline stage, ascending; interleaved stages hold several runs of them."""
        first, last = self.first_stage_layers, self.last_stage_layers
        if not first and not last:
            run = num_layers // (self.pp * self.vp)
            starts = (np.arange(self.vp) * self.pp + stage) * run
            return (starts[:, None] + np.arange(run)).ravel()
        between = self.pp - bool(first) - bool(last)
        even = (num_layers - first - last) // between if between else 0
        sizes = [first or even, *[even] * (self.pp - 2), last or even]
        return np.arange(sum(sizes[:stage]), sum(sizes[: stage + 1]))


@dataclass(frozen=True)
class RolloutLayout:
    """vLLM engines of `tp` ranks each."""

    tp: int
    replicas: int
    """Engines, all with the same weights."""
    expert_parallel: bool = False
    """vLLM's enable_expert_parallel: experts are dealt out over the tp ranks, not split."""
    first_rank: int = 0
    """Global number of the first rollout rank: 0, and rollout rank i is actor rank i's process (colocated); the actor's
    world size, and they are processes of their own."""

    @property
    def num_ranks(self) -> int:
        return self.tp * self.replicas

    def groups_per_engine(self, actor: ActorLayout) -> int:
        """Parts of an engine's ranks that are at different pipeline stages at a time: several where there are more
        stages than engines, and fewer ranks with parts of a tensor than there are to take it."""
        return max(1, min(actor.pp // self.replicas, -(-self.tp // actor.tp)))

    def group(self, actor: ActorLayout, replica: int | np.ndarray, tp_rank: int | np.ndarray) -> np.ndarray:
        """Number of a rank's part, counted over all engines. Neighbours are in different ones: what they take of a
        tensor is often one rank's."""
        per_engine = self.groups_per_engine(actor)
        return np.asarray(replica * per_engine + tp_rank % per_engine)

    def first_stage(self, actor: ActorLayout, group: np.ndarray) -> np.ndarray:
        """Where a part of the ranks begins: an engine in the actor's processes with the stage that these have."""
        return group * actor.pp // (self.replicas * self.groups_per_engine(actor))

    def rank(self, replica: int, tp_rank: int) -> int:
        """Global number of a rollout rank."""
        return self.first_rank + replica * self.tp + tp_rank

    def place(self, rank: int) -> tuple[int, int] | None:
        """(replica, tp rank) of a global rank; None: it is no rollout rank."""
        index = rank - self.first_rank
        return divmod(index, self.tp) if 0 <= index < self.num_ranks else None
