"""One rank of logprobs.py: forward and backward of the given ways in turn, their seconds and peak memory."""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peak_memory import peak_memory
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.config import ActorConfig, RunConfig
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.distributed.launch import die_with_launcher, process_env
from megatron_riskpo.distributed.runtime import rank_runtime

if TYPE_CHECKING:
    from logprob_ways import Inputs

HIDDEN_STD, LOGIT_STD = 1.0, 2.0
"""Of hidden states after a norm; of logits, so that an entropy is some nats below that of the uniform distribution."""

ENTROPY = ("a metric", "in the loss")


@dataclass(frozen=True)
class Shape:
    """What every way is given."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    temperature: float = 0.8


@dataclass(frozen=True)
class Run:
    """One forward and backward pass."""

    wall: float
    processor: float
    """Seconds of this process (not on a GPU's: its kernels run beside)."""
    peak_bytes: int


def make_inputs(shape: Shape, tp: ProcessGroup, device: torch.device, entropy_in_loss: bool) -> "Inputs":
    """The same numbers on any number of ranks."""
    # Megatron may only be imported once rank_runtime has put the CPU backend in place.
    from logprob_ways import Inputs

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    hidden = HIDDEN_STD * torch.randn(shape.tokens, shape.hidden, generator=generator)
    targets = torch.randint(0, shape.vocab, (shape.tokens,), generator=generator)
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator)
    mine = weight.mul_(LOGIT_STD / shape.hidden**0.5).chunk(tp.size())[tp.rank()].clone()
    hidden, mine = (tensor.to(device, dtype).requires_grad_() for tensor in (hidden, mine))
    return Inputs(hidden, mine, targets.to(device), shape.temperature, tp, entropy_in_loss)


def forward_backward(way: str, inputs: "Inputs") -> tuple[Tensor, Tensor]:
    """Leaves gradients on hidden states and weights; each position has a coefficient of its own, as advantages are."""
    from logprob_ways import WAYS

    logprobs, entropy = WAYS[way](inputs)
    coefficients = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device)
    loss = (logprobs * coefficients).sum()
    if inputs.entropy_in_loss:
        loss = loss + 0.1 * (entropy * coefficients).sum()
    loss.backward()
    return logprobs.detach(), entropy.detach()


def measure(way: str, inputs: "Inputs") -> Run:
    inputs.hidden.grad = inputs.weight.grad = None
    device = inputs.hidden.device
    with peak_memory(device) as peak:
        torch.distributed.barrier()
        wall, processor = time.perf_counter(), time.process_time()
        forward_backward(way, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
    return Run(wall, processor, peak.bytes)


def results(way: str, inputs: "Inputs") -> dict[str, Any]:
    """For comparisons: values, and gradients of hidden states and of this rank's weights."""
    inputs.hidden.grad = inputs.weight.grad = None
    logprobs, entropy = forward_backward(way, inputs)
    return {"logprobs": logprobs, "entropy": entropy, "hidden": inputs.hidden.grad, "weight": inputs.weight.grad}


def largest_difference(way: str, inputs: "Inputs", other: str) -> float:
    """Relative, in the 2-norm; the worst of values and gradients."""
    expected = results(other, inputs)
    found = results(way, inputs)
    return max(float((found[key] - expected[key]).norm() / expected[key].norm()) for key in expected)


def run(shape: Shape, ways: list[str], repeats: int, grid: RankGrid) -> dict[str, Any]:
    """With the entropy in either place: all ways in turn, after a turn that does not count; differences from the last
    of them if there are several."""
    report = {}
    for place in ENTROPY:
        inputs = make_inputs(shape, grid.tp, grid.device, entropy_in_loss=place == "in the loss")
        turns = [{way: measure(way, inputs) for way in ways} for _ in range(1 + repeats)]
        differences = {way: largest_difference(way, inputs, ways[-1]) for way in ways[:-1]}
        runs = {way: [asdict(turn[way]) for turn in turns[1:]] for way in ways}
        report[place] = {"runs": runs, "differences": differences}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=Path, help="JSON: shape, ways, repeats")
    arguments = parser.parse_args()
    die_with_launcher()
    env = process_env()
    if env is None:
        parser.error("start it through logprobs.py, which gives it its ranks")
    task = json.loads(arguments.task.read_text())
    with rank_runtime(env, RunConfig(), ActorConfig(tp=env.world_size)) as grid:
        report = run(Shape(**task["shape"]), task["ways"], task["repeats"], grid)
        arguments.task.with_name(f"rank_{grid.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
