"""What is in flight on a pipeline stage, as Megatron's schedules order the passes."""

from collections import Counter

from megatron_riskpo.config import ActorConfig


def most_in_flight(actor: ActorConfig, stage: int, num_micro_batches: int) -> dict[int, int]:
    """By virtual stage of the rank: forward passes that wait for their backward pass when most do, the one whose
    backward pass comes next included.

    One pass forward, one backward (arXiv 2104.04473): the earlier the stage, the more it has to run ahead.
    """
    if actor.vp == 1:
        return {0: min(num_micro_batches, actor.pp - stage)}
    ahead = 2 * (actor.pp - stage - 1) + (actor.vp - 1) * actor.pp
    started = min(num_micro_batches * actor.vp, ahead + 1)
    return dict(Counter(_virtual_stage(actor, number) for number in range(started)))


def _virtual_stage(actor: ActorConfig, number: int) -> int:
    """Of the rank's forward pass `number`: pp micro-batches go through a virtual stage, then through the next."""
    return number // actor.pp % actor.vp


def bubble_share(actor: ActorConfig, num_micro_batches: int) -> float:
    """Idle time over busy time of a stage (arXiv 2104.04473, section 2.2)."""
    return (actor.pp - 1) / (num_micro_batches * actor.vp)


def layers_of_chunk(actor: ActorConfig, num_layers: int, stage: int) -> int:
    """Transformer layers in a virtual stage of the pipeline stage."""
    given = {0: actor.first_stage_layers, actor.pp - 1: actor.last_stage_layers}
    given = {where: count for where, count in given.items() if count}
    if stage in given and actor.pp > 1:
        return given[stage]
    return (num_layers - sum(given.values())) // (actor.pp - len(given)) // actor.vp
