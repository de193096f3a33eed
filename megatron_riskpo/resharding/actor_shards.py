"""What one rank of the trainer has to give to servers, each of whose workers gets its shard by plan."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.errors import RunError
from megatron_riskpo.resharding.layouts import ActorLayout
from megatron_riskpo.resharding.node import agreed_node_size
from megatron_riskpo.resharding.schedule import BridgeLayout

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
    node_size: int
    """Ranks that share a machine, the same number on every rank."""

    @classmethod
    def of(cls, actor: "Actor") -> "ActorShards":
        """Collective."""
        # Megatron may only be imported once the CPU backend is in place.
        from megatron_riskpo.actor.model import named_parameters

        layout = ActorLayout.of(actor.config, actor.grid.world.size())
        parameters = dict(named_parameters(actor.chunks))
        return cls(actor.hf_config, layout, parameters, agreed_node_size(actor.grid.world))

    @property
    def example(self) -> Tensor:
        """One of them, for dtype and device."""
        return next(iter(self.parameters.values())).detach()

    def layout_options(self, config: TrainConfig, num_servers: int) -> dict[str, Any]:
        """JSON-able, for `served_layout`."""
        rollout = config.rollout
        return {
            "hf_config": dict(self.hf_config), "actor": asdict(self.layout), "tp": rollout.tp,
            "expert_parallel": rollout.expert_parallel, "servers": num_servers,
            "item_size": self.example.element_size(), "bucket_mib": config.bridge.bucket_mib,
            "node_size": self.node_size,
        }  # fmt: skip

    @property
    def dtype(self) -> str:
        """As model.dtype says it."""
        return str(self.example.dtype).removeprefix("torch.")


def served_layout(options: Mapping[str, Any]) -> BridgeLayout:
    """Of ranks and servers, on either side. Raises UsageError for layouts that cannot be."""
    return BridgeLayout.served(**{**options, "actor": ActorLayout(**options["actor"])})


def layout_for_server(options: Mapping[str, Any], tp: int) -> BridgeLayout:
    """As `served_layout`, in a worker of a server. RunError where the run plans for servers of another size."""
    layout = served_layout(options)
    if layout.rollout.tp != tp:
        raise RunError(
            f"this server has rollout.tp = {tp}, the run that pushes weights {layout.rollout.tp}; set both alike"
        )
    return layout
