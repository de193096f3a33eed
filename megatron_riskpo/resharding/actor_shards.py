"""What one rank of the trainer has to give to servers that get their shards over the network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_riskpo.resharding.layouts import ActorLayout

if TYPE_CHECKING:
    from megatron_riskpo.actor.actor import Actor


@dataclass(frozen=True)
class ActorShards:
    """The rank's own parameters, and the layout that says what they are."""

    hf_config: Mapping[str, Any]
    """config.json."""
    layout: ActorLayout
    parameters: Mapping[str, Tensor]
    """By their names in the family's table; the same storage all the time."""

    @classmethod
    def of(cls, actor: "Actor") -> "ActorShards":
        # Megatron may only be imported once the CPU backend is in place.
        from megatron_riskpo.actor.model import named_parameters

        layout = ActorLayout.of(actor.config, actor.grid.world.size())
        return cls(actor.hf_config, layout, dict(named_parameters(actor.chunks)))

    @property
    def example(self) -> Tensor:
        """One of them, for dtype and device."""
        return next(iter(self.parameters.values())).detach()
