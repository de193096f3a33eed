"""Gradients that hold memory only during an optimizer step change no update. One process; several: the layouts' tests
with plain gradients, since what is given back here is each rank's own."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from megatron_riskpo.actor.actor import Actor
from megatron_riskpo.algorithms.config import PolicyLossConfig
from megatron_riskpo.algorithms.token_inputs import TokenInputs
from megatron_riskpo.config import ActorConfig, OptimizerConfig
from megatron_riskpo.distributed.grid import build_grid
from tests.distributed.layout_cases import ragged_rollouts
from tests.tiny_models import make_tiny_qwen2


@pytest.fixture(autouse=True)
def _single_rank():
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def gradient_bytes(actor: Actor) -> int:
    return sum(buffer.grad_data.untyped_storage().nbytes() for chunk in actor.model for buffer in chunk.buffers)


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_updates_are_the_same_and_hold_no_gradients_in_between(tmp_path, distributed_optimizer):
    model = make_tiny_qwen2(tmp_path / "model", tied=True, seed=0)
    plain = ActorConfig(micro_batch_tokens=200, distributed_optimizer=distributed_optimizer)
    grid = build_grid(plain, seed=1)
    rollouts, advantages, _ = ragged_rollouts()
    updated = {}
    for config in (plain, dataclasses.replace(plain, offload_gradients=True)):
        actor = Actor.from_hf(model, config, OptimizerConfig(lr=1e-3), torch.float32, grid)
        held = [gradient_bytes(actor)]
        for _ in range(2):
            actor.update(rollouts, advantages, TokenInputs(), PolicyLossConfig(), 1.0, 40, num_optimizer_steps_total=2)
            held.append(gradient_bytes(actor))
            actor.logprobs(rollouts, 1.0)
        updated[config.offload_gradients] = {name: tensor.clone() for name, tensor in actor.export_weights()}
        assert all((size == 0) == config.offload_gradients for size in held)
    for name, tensor in updated[True].items():
        assert torch.equal(tensor, updated[False][name]), name
