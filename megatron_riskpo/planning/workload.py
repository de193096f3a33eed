"""What a step has to do: how many sequences of which length, in which micro-batches."""

import math
from dataclasses import dataclass

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.planning.activations import Lengths
from megatron_riskpo.planning.gpus import MEAN_SHARE


@dataclass(frozen=True)
class Workload:
    """Of one RL step over all ranks."""

    num_prompts: int
    group_size: int
    mean_prompt: float
    """Tokens."""
    mean_response: float
    longest_response: int
    micro_batches: int
    """Of a mini-batch, on each data-parallel rank."""
    fullest: Lengths
    """The micro-batch with the most tokens that may come."""

    @property
    def num_sequences(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def num_tokens(self) -> float:
        """Prompts and responses."""
        return self.num_sequences * (self.mean_prompt + self.mean_response)

    @property
    def squared_lengths(self) -> float:
        """Sum over the sequences, of sequences of the mean length."""
        return self.num_sequences * (self.mean_prompt + self.mean_response) ** 2


def workload(config: TrainConfig, data_parallel: int, mean_response: float | None = None) -> Workload:
    """Of a step of `config`; mean_response in tokens, without it the assumed share of the longest."""
    prompts, actor = config.data.prompts_per_step, config.actor
    mean_prompt = max(1.0, MEAN_SHARE * config.data.max_prompt_tokens)
    mean = mean_response or MEAN_SHARE * config.rollout.max_response_tokens
    mean = min(max(1.0, mean), config.rollout.max_response_tokens)
    of_a_rank = prompts * config.rollout.group_size / actor.mini_batches / data_parallel * (mean_prompt + mean)
    micro_batches = max(1, math.ceil(of_a_rank / (actor.micro_batch_tokens * actor.cp)))
    if actor.vp > 1:
        micro_batches = math.ceil(micro_batches / actor.pp) * actor.pp
    return Workload(
        num_prompts=prompts,
        group_size=config.rollout.group_size,
        mean_prompt=mean_prompt,
        mean_response=mean,
        longest_response=config.rollout.max_response_tokens,
        micro_batches=micro_batches,
        fullest=fullest_micro_batch(config),
    )


def fullest_micro_batch(config: TrainConfig) -> Lengths:
    """Sequences of the longest length, as many as go into a micro-batch and one that fills it up; or a single one that
    is longer than the micro-batch. Prompts of the mean length: the more are responses, the more is scored."""
    prompt = max(1, round(MEAN_SHARE * config.data.max_prompt_tokens))
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    room = config.actor.micro_batch_tokens * config.actor.cp
    whole, rest = divmod(max(room, longest), longest)
    lengths = [longest] * whole + ([rest] if rest > 1 else [])
    prompts = tuple(min(prompt, length - 1) for length in lengths)
    return Lengths(prompts, tuple(length - p for length, p in zip(lengths, prompts, strict=True)))
