"""What update.py times: one model, one batch of ragged rollouts, the layouts, and the ways to lay sequences out."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_riskpo.config import ActorConfig
from megatron_riskpo.rollout.types import Rollouts

PAD_ID = 0


@dataclass(frozen=True)
class Workload:
    """Model and rollouts, the same in every row of the table."""

    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 8
    num_kv_heads: int = 4
    intermediate_size: int = 704
    vocab_size: int = 4096
    num_sequences: int = 64
    median_response_tokens: int = 96
    sigma: float = 0.8
    """Of the logarithm of a response's length."""
    max_response_tokens: int = 512
    prompt_tokens: tuple[int, int] = (16, 48)
    """Shortest and longest prompt."""
    micro_batch_tokens: int = 1024
    """Budget of a micro-batch on a rank; padding counts."""

    def hf_config(self) -> dict[str, Any]:
        """A Qwen2 model's config.json."""
        return {
            "model_type": "qwen2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": 2 * (self.prompt_tokens[1] + self.max_response_tokens),
            "tie_word_embeddings": True,
        }


NUMBERS = tuple(item.name for item in fields(Workload) if item.type is int)
"""What the command line can change."""


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    for name in NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)


def chosen_workload(arguments: argparse.Namespace, default: Workload) -> Workload:
    """The default with the command line's changes."""
    given = {name: getattr(arguments, name) for name in NUMBERS}
    return replace(default, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Layout:
    """How many ranks share the work, and how."""

    num_ranks: int
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1

    def actor_config(self, workload: Workload) -> ActorConfig:
        return ActorConfig(
            tp=self.tp, pp=self.pp, vp=self.vp, cp=self.cp, micro_batch_tokens=workload.micro_batch_tokens
        )

    @property
    def multiple_of(self) -> int:
        """What the number of all ranks' micro-batches must divide by: as many on each data-parallel rank, and on it
        whole groups of pp for the interleaved schedule."""
        data_parallel = self.num_ranks // (self.tp * self.pp * self.cp)
        return data_parallel * (self.pp if self.vp > 1 else 1)


LAYOUTS = {
    "TP1": Layout(1),
    "TP2": Layout(2, tp=2),
    "PP2": Layout(2, pp=2),
    "DP2": Layout(2),
    "CP2": Layout(2, cp=2),
    "PP2 VP2": Layout(2, pp=2, vp=2),
}
BASELINE = ("TP1", "packed")
WAYS = ("packed", "padded", "padded, sorted")


def write_model(workload: Workload, folder: Path) -> int:
    """A checkpoint of random weights, so that every layout has the same ones; returns its number of parameters."""
    # The ranks need not wait for it.
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**workload.hf_config(), dtype="float32"))
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_rollouts(workload: Workload) -> Rollouts:
    """Log-normal response lengths, random tokens; the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(workload.num_sequences, generator=generator)
    responses = (workload.median_response_tokens * (workload.sigma * normal).exp()).long()
    responses = responses.clamp(1, workload.max_response_tokens)
    shortest, longest = workload.prompt_tokens
    prompts = torch.randint(shortest, longest + 1, (workload.num_sequences,), generator=generator)
    return Rollouts(
        tokens=torch.randint(PAD_ID + 1, workload.vocab_size, (int((prompts + responses).sum()),), generator=generator),
        prompt_lengths=prompts,
        response_lengths=responses,
        rollout_logprobs=torch.zeros(int(responses.sum())),
        finished=torch.ones(workload.num_sequences, dtype=torch.bool),
    )


def padded_micro_batches(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, multiple_of: int
) -> list[list[int]]:
    """Sequences taken in the given order, a micro-batch closed where one more would make its rectangle (sequences times
    longest) exceed max_tokens. The largest are halved until multiple_of divides their number."""
    bins: list[list[int]] = []
    longest = 0
    for row in order:
        widest = max(longest, lengths[row])
        if bins and widest * (len(bins[-1]) + 1) <= max_tokens:
            bins[-1].append(row)
            longest = widest
        else:
            bins.append([row])
            longest = lengths[row]
    while len(bins) % multiple_of:
        index = max(range(len(bins)), key=lambda i: len(bins[i]))
        rows = bins[index]
        bins[index : index + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return bins


def pad_to_longest(rollouts: Rollouts, micro_batches: Sequence[Sequence[int]]) -> tuple[Rollouts, Tensor]:
    """Each response followed by dummy tokens up to the longest sequence of its micro-batch; and which response tokens
    are real, bool [num_response_tokens]."""
    lengths = rollouts.lengths
    padded = torch.empty_like(lengths)
    for rows in micro_batches:
        padded[list(rows)] = lengths[list(rows)].max()
    missing = (padded - lengths).tolist()
    pieces, keep = [], []
    for tokens, real, dummies in zip(rollouts.sequences(), rollouts.response_lengths.tolist(), missing, strict=True):
        pieces += [tokens, tokens.new_full((dummies,), PAD_ID)]
        keep += [torch.ones(real, dtype=torch.bool), torch.zeros(dummies, dtype=torch.bool)]
    mask = torch.cat(keep)
    longer = Rollouts(
        tokens=torch.cat(pieces),
        prompt_lengths=rollouts.prompt_lengths,
        response_lengths=padded - rollouts.prompt_lengths,
        rollout_logprobs=torch.zeros(mask.numel()),
        finished=rollouts.finished,
    )
    return longer, mask
