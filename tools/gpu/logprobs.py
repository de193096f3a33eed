"""Time and peak memory of log-probs and entropy on one GPU, from hidden states to their gradients.

8,192 tokens, a vocabulary of 151,936, hidden size 1,536, bfloat16: the output layer of Qwen2.5-1.5B. Ways:
- fused: megatron_riskpo/actor/logprobs.py;
- plain: whole logits, float32 log_softmax, by autograd;
- liger: liger-kernel's fused linear cross-entropy, where it is installed. It gives one sum of log-probs, with one
  coefficient for all tokens, and no entropy: less than the others do.
The loss is the sum of negative log-probs; the entropy is once a metric without a gradient, once in the loss. Peaks are
what a pass holds beyond its inputs: gradients count. The device's matrix rate and copy rate are measured in the same
run. FLOPs are those of the three products, logits and two gradients: what a way computes again does not count. One
JSON object on stdout.
Usage: python tools/gpu/logprobs.py [--small] [--json logprobs.json]
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from ceilings import Ceilings, describe, measure_ceilings, the_device, time_calls
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.actor.logprobs import vocab_parallel_logprobs
from megatron_riskpo.observability.memory import GIB, CudaPeak, ResidentPeak

DTYPE = torch.bfloat16
ENTROPY_COEFFICIENT = 0.01
FULL, SMALL = (8192, 151_936, 1536), (64, 1024, 32)
"""Tokens, vocabulary, hidden size."""


@dataclass(frozen=True)
class Inputs:
    """hidden [n, h] and weight [v, h] are leaves; targets [n]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    entropy_in_loss: bool

    @classmethod
    def of(cls, sizes: tuple[int, int, int], device: torch.device, entropy_in_loss: bool) -> "Inputs":
        """Logits of a standard deviation of 2: an entropy some nats below the uniform distribution's."""
        num_tokens, vocab, hidden_size = sizes
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(num_tokens, hidden_size, generator=generator, device=device, dtype=DTYPE)
        weight = torch.randn(vocab, hidden_size, generator=generator, device=device, dtype=DTYPE)
        weight.mul_(2 / hidden_size**0.5)
        targets = torch.randint(0, vocab, (num_tokens,), generator=generator, device=device)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), targets, entropy_in_loss)

    def loss(self, logprobs: Tensor, entropy: Tensor) -> Tensor:
        loss = -logprobs.sum()
        return loss - ENTROPY_COEFFICIENT * entropy.sum() if self.entropy_in_loss else loss


Way = Callable[[Inputs], Tensor]
"""The loss, float32 []."""


def fused(tp: ProcessGroup) -> Way:
    def loss(inputs: Inputs) -> Tensor:
        vocab = inputs.weight.size(0)
        return inputs.loss(*vocab_parallel_logprobs(inputs.hidden, inputs.weight, inputs.targets, 0, vocab, 1.0, tp))

    return loss


def plain(inputs: Inputs) -> Tensor:
    log_p = (inputs.hidden @ inputs.weight.t()).float().log_softmax(dim=-1)
    with torch.set_grad_enabled(inputs.entropy_in_loss):
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return inputs.loss(log_p.gather(1, inputs.targets[:, None])[:, 0], entropy)


def liger(device: torch.device) -> Way | str:
    """Or why it is not measured."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return "not installed"
    if device.type != "cuda":
        return "needs a GPU"
    summed = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda inputs: summed(inputs.weight, inputs.hidden, inputs.targets)


def forward_backward(way: Way, inputs: Inputs) -> Tensor:
    inputs.hidden.grad = inputs.weight.grad = None
    loss = way(inputs)
    loss.backward()
    return loss.detach()


def measure(way: Way, inputs: Inputs, repeats: int, ceilings: Ceilings) -> dict[str, Any]:
    device = inputs.hidden.device
    try:
        seconds = time_calls(lambda: forward_backward(way, inputs), device, repeats)
        peak_gib = measure_peak(way, inputs)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error)}
    (num_tokens, hidden_size), vocab = inputs.hidden.shape, inputs.weight.size(0)
    flops = 3 * 2 * num_tokens * hidden_size * vocab
    return {
        "seconds": median(seconds),
        "seconds_of_each": seconds,
        "peak_gib": peak_gib,
        "share_of_matrix_ceiling": flops / median(seconds) / ceilings.matrix_flops,
    }


def measure_peak(way: Way, inputs: Inputs) -> float | None:
    """Of one more pass, beyond what is held before it; None where the system has no such mark."""
    inputs.hidden.grad = inputs.weight.grad = None
    meter = CudaPeak() if inputs.hidden.is_cuda else ResidentPeak()
    meter.reset()
    before = meter.read()
    forward_backward(way, inputs)
    peak = meter.read()
    return None if before is None or peak is None else (peak - before) / GIB


def differences(found: Way, expected: Way, inputs: Inputs) -> dict[str, float]:
    """Relative, in the 2-norm: of the loss, and of the gradients of hidden states and weights."""
    results = []
    for way in (found, expected):
        loss = forward_backward(way, inputs)
        results.append((loss, inputs.hidden.grad, inputs.weight.grad))
    names = ("loss", "hidden", "weight")
    return {
        name: float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        for name, mine, theirs in zip(names, *results, strict=True)
    }


def measure_all(inputs: Inputs, ways: dict[str, Way | str], repeats: int, ceilings: Ceilings) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, way in ways.items():
        if isinstance(way, str):
            report[name] = way
            continue
        report[name] = measure(way, inputs, repeats, ceilings)
        if name != "plain" and "seconds" in report.get("plain", {}) and "seconds" in report[name]:
            report[name]["difference_from_plain"] = differences(way, plain, inputs)
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows on a CPU that the script runs")
    parser.add_argument("--json", type=Path, help="write the JSON here as well")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    given = (arguments.tokens, arguments.vocab, arguments.hidden)
    sizes = tuple(own or usual for own, usual in zip(given, SMALL if arguments.small else FULL, strict=True))
    device = the_device()
    # One rank: the fused way asks its group for the size, and sends nothing.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ceilings = measure_ceilings(device, DTYPE, arguments.small)
    report = describe(device) | {"sizes": dict(zip(("tokens", "vocab", "hidden"), sizes, strict=True))}
    report["ceilings"] = asdict(ceilings)
    for place in ("a metric", "in the loss"):
        inputs = Inputs.of(sizes, device, entropy_in_loss=place == "in the loss")
        ways: dict[str, Way | str] = {"plain": plain, "fused": fused(dist.group.WORLD)}
        if not inputs.entropy_in_loss:
            ways["liger"] = liger(device)
        report[f"entropy {place}"] = measure_all(inputs, ways, arguments.repeats, ceilings)
    dist.destroy_process_group()
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
