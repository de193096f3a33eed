import pytest
import torch

from megatron_riskpo.resharding.node import node_size

SLURM = "SLURM_STEP_TASKS_PER_NODE"
CASES = {
    "torchrun": ({"LOCAL_WORLD_SIZE": "4", SLURM: "1"}, 1, 4),
    "Slurm, each task its own GPU": ({SLURM: "8(x2)"}, 1, 8),
    "Slurm, one node": ({SLURM: "16"}, 1, 16),
    "Slurm, uneven": ({SLURM: "8(x2),4"}, 8, 8),
    "nothing said": ({}, 8, 8),
    "no GPU": ({}, 0, 20),
}
"""Environment, visible GPUs, ranks of a machine among 20."""


@pytest.mark.parametrize("name", CASES)
def test_ranks_of_a_machine(name, monkeypatch):
    environ, num_gpus, expected = CASES[name]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert node_size(20, environ) == expected
