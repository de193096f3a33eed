"""AdamW under Megatron's optimizers, and what torch's AdamW needs mended in megatron-core 0.16.1.

Without TransformerEngine and Apex, Megatron wraps torch.optim.AdamW. Its distributed optimizer then loses track of
AdamW's `step` in checkpoints, in three ways; each is mended here, and nothing is done where another Adam is used. With
any Adam it saves a buffer of several buckets shifted: `padding_counted`.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_riskpo.config import ActorConfig, OptimizerConfig

_HYPERPARAMETERS = ("betas", "eps", "weight_decay")


def build_optimizer(
    model: Sequence[DistributedDataParallel], config: OptimizerConfig, actor: ActorConfig, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW with float32 main weights; its state sharded over data-parallel ranks by the distributed optimizer."""
    _let_load_pass_step_through()
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=actor.distributed_optimizer,
        ),
        list(model),
    )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of num_steps.

    A function of the step alone: there is no scheduler state that a resume could restore wrongly.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its AdamW state before a checkpoint is loaded into a fresh optimizer.

    torch allocates it at the first step; Megatron's loader takes it for granted. The load overwrites the values.
    """
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter].update(
                        step=torch.tensor(0.0),
                        exp_avg=torch.zeros_like(parameter.data),
                        exp_avg_sq=torch.zeros_like(parameter.data),
                    )


def unshare_steps(optimizer: MegatronOptimizer) -> None:
    """After a load: give every parameter a `step` of its own.

    Megatron's loader hands one tensor to all of them; AdamW would then count one step per parameter.
    """
    for adam in _torch_adams(optimizer):
        for state in adam.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


@contextmanager
def hyperparameters_kept(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Around a load: parameter groups bring the moments' decays and the weight decay along that the state was saved
    with. Those of the configuration stay, so that a change which the user has accepted is one."""
    kept = [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)


@contextmanager
def padding_counted(optimizer: MegatronOptimizer) -> Iterator[None]:
    """What has to be around a distributed optimizer's sharded_state_dict.

    It lays the buckets of a gradient buffer end to end without their padding, but cuts them at the parameters' places
    in the padded buffer. With more than one bucket (a tied embedding in the last pipeline stage has its own) everything
    behind a padded one would be saved shifted, and the last of it as zeros. In the body the padding counts as content.
    """
    buffers = [buffer for inner in inner_optimizers(optimizer) for buffer in getattr(inner, "buffers", ())]
    sizes = {buffer: buffer.numel for buffer in buffers}
    sizes |= {bucket: bucket.grad_data.numel() for buffer in buffers for bucket in buffer.buckets}
    unpadded = {holder: holder.numel_unpadded for holder in sizes}
    try:
        for holder, size in sizes.items():
            holder.numel_unpadded = size
        yield
    finally:
        for holder, size in unpadded.items():
            holder.numel_unpadded = size


def inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Those that a ChainedOptimizer is made of; any other is its own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for inner in inner_optimizers(optimizer):
        if isinstance(inner.optimizer, torch.optim.Adam | torch.optim.AdamW):
            yield inner.optimizer


def _let_load_pass_step_through() -> None:
    """The loader looks for every state of AdamW among the loaded tensors, but `step` is saved with the parameter
    groups, and already restored from there."""
    plain = DistributedOptimizer._set_main_param_and_optimizer_states
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def with_step(self: DistributedOptimizer, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        known = {"step": state["step"]} if "step" in state else {}
        plain(self, model_param, {**known, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step  # type: ignore[method-assign]
