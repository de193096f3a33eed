"""Prompts dealt to engine replicas, responses gathered from them: every rank ends up with the whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_riskpo.rollout.types import OnFinished, Rollouts


@dataclass(frozen=True)
class Responses:
    """Responses without their prompts; N sequences, T response tokens over all."""

    lengths: Tensor
    """int32 [N]."""
    finished: Tensor
    """int32 [N], 1: ended with a stop token."""
    tokens: Tensor
    """int32 [T]."""
    logprobs: Tensor
    """float32 [T]."""
    versions: Tensor
    """int32 [T]: version of the weights that each token was sampled with."""

    def pack(self) -> Tensor:
        """int32 [2N + 3T]: one message, the log-probs as their bits."""
        return torch.cat([self.lengths, self.finished, self.tokens, self.logprobs.view(torch.int32), self.versions])

    @staticmethod
    def unpack(message: Tensor, num_sequences: int) -> "Responses":
        num_tokens = (message.numel() - 2 * num_sequences) // 3
        sizes = [num_sequences, num_sequences, num_tokens, num_tokens, num_tokens]
        lengths, finished, tokens, bits, versions = message.split(sizes)
        return Responses(lengths, finished, tokens, bits.contiguous().view(torch.float32), versions)

    @staticmethod
    def concatenate(parts: Sequence["Responses"]) -> "Responses":
        names = [item.name for item in fields(Responses)]
        return Responses(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def slice_of(num_items: int, num_parts: int, part: int) -> slice:
    """Contiguous slice `part` of num_items dealt to num_parts; sizes differ by at most one."""
    return slice(num_items * part // num_parts, num_items * (part + 1) // num_parts)


def in_turns(on_finished: OnFinished | None, first_row: int, rank: int, num_ranks: int) -> OnFinished:
    """Takes the place of `on_finished` for a replica's responses, numbered from 0, of which `first_row` is the batch's
    first: all of the replica's ranks see each, and take turns. `rank`: this one, within the replica."""

    def tell(row: int, tokens: Sequence[int]) -> None:
        if on_finished is not None and row % num_ranks == rank:
            on_finished(first_row + row, tokens)

    return tell


def gather_responses(local: Responses, num_prompts: int, group_size: int, tp: int, group: ProcessGroup) -> Responses:
    """All replicas' responses in prompt order, on every rank (collective over `group`).

    Replica i is the ranks i*tp .. i*tp+tp-1, which hold the same `local`; its first rank contributes.
    """
    if group.size() == tp:
        return local
    is_first = group.rank() % tp == 0
    messages = _gather_messages(local.pack() if is_first else local.tokens.new_empty(0), group)
    num_replicas = group.size() // tp
    parts = []
    for replica, message in enumerate(messages[::tp]):
        part = slice_of(num_prompts, num_replicas, replica)
        parts.append(Responses.unpack(message, (part.stop - part.start) * group_size))
    return Responses.concatenate(parts)


def _gather_messages(message: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's 1-D int32 message, whatever their lengths; two collectives, results on the CPU."""
    gloo = "gloo" in dist.get_backend(group)
    device = torch.device("cpu") if gloo else torch.device("cuda", torch.cuda.current_device())
    size = torch.tensor([message.numel()], device=device)
    sizes = [torch.empty_like(size) for _ in range(group.size())]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(s) for s in sizes]
    padded = torch.zeros(max(lengths), dtype=message.dtype, device=device)
    padded[: message.numel()] = message
    buffers = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(buffers, padded, group=group)
    return [buffer[:length].cpu() for buffer, length in zip(buffers, lengths, strict=True)]


def join_prompts(prompts: Sequence[Sequence[int]], group_size: int, responses: Responses) -> Rollouts:
    """Rollouts out of P prompts and their P * group_size responses."""
    prompt_tensors = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    pieces = responses.tokens.long().split(responses.lengths.tolist())
    pairs = [part for i, piece in enumerate(pieces) for part in (prompt_tensors[i // group_size], piece)]
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
    return Rollouts(
        tokens=torch.cat(pairs) if pairs else torch.empty(0, dtype=torch.int64),
        prompt_lengths=lengths.repeat_interleave(group_size),
        response_lengths=responses.lengths.long(),
        rollout_logprobs=responses.logprobs,
        finished=responses.finished.bool(),
        weight_versions=responses.versions,
    )
