"""What one rank does in test_logprobs: log-probs and entropy of shards of one vocabulary. Imported by the ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.actor import logprobs as module
from megatron_riskpo.actor.logprobs import vocab_parallel_logprobs
from tests.distributed.quantile_cases import counted

NUM_ROWS, HIDDEN = 50, 24
CASES = {
    f"{vocab_size} entries, {dtype}, temperature {temperature}, chunks of {width}, {loss}": (
        vocab_size, dtype, temperature, width, loss,
    )
    for vocab_size, width in ((96, 1000), (97, 10), (5, 256))  # of 5 entries on 4 ranks, one rank holds padding only
    for dtype in (torch.float32, torch.float64)
    for temperature, loss in ((1.0, "log-probs"), (0.7, "both"))
}  # fmt: skip


def make_inputs(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, whole weights without padding, targets, and what the loss multiplies the outputs by."""
    g = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=g).to(dtype)
    weight = (0.5 * torch.randn(vocab_size, HIDDEN, generator=g)).to(dtype)
    return hidden, weight, torch.randint(0, vocab_size, (NUM_ROWS,), generator=g), torch.randn(2, NUM_ROWS, generator=g)


def one_case(vocab_size: int, dtype: torch.dtype, temperature: float, width: int, loss: str) -> dict[str, Any]:
    """Values, the whole gradient of `hidden` and this rank's of its weights, and the number of all-reduces."""
    world = dist.group.WORLD
    module.MIN_CHUNK_WIDTH, module.CHUNK_ELEMENTS = width, {"cpu": 1}
    hidden, weight, targets, coefficients = make_inputs(vocab_size, dtype)
    local_size = -(-vocab_size // world.size())
    first_id = world.rank() * local_size
    # Padding of large weights: were it to take probability, every value would change.
    shard = torch.full((local_size, HIDDEN), 7.0, dtype=dtype)
    mine = weight[first_id : first_id + local_size]
    shard[: len(mine)] = mine
    hidden, shard = hidden.requires_grad_(), shard.requires_grad_()
    with counted() as calls:
        logprobs, entropy = vocab_parallel_logprobs(hidden, shard, targets, first_id, len(mine), temperature, world)
    total = (logprobs * coefficients[0]).sum()
    if loss == "both":
        total = total + (entropy * coefficients[1]).sum()
    total.backward()
    assert hidden.grad is not None
    assert shard.grad is not None
    dist.all_reduce(hidden.grad)
    return {
        "values": torch.stack([logprobs, entropy]).detach(),
        "hidden": hidden.grad,
        "weight": shard.grad[: len(mine)],
        "padding": shard.grad[len(mine) :],
        "num_collectives": len(calls),
    }


def run(folder: Path) -> dict[str, dict[str, Any]]:
    """All cases."""
    return {name: one_case(*case) for name, case in CASES.items()}
