"""Log-probs of given texts by Megatron and by transformers: whether a conversion still is the same model.

In float32, whatever the weights' dtype, so that the two differ by rounding only; one of the two models in memory at a
time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_riskpo.checkpoint.manifest import SHARDED
from megatron_riskpo.checkpoint.source import find_checkpoint
from megatron_riskpo.checkpoint.team import Team
from megatron_riskpo.checkpoint.weight_map import family_of, shape_of
from megatron_riskpo.config import ActorConfig
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.data.tokenizer import load_tokenizer
from megatron_riskpo.distributed.grid import RankGrid, build_grid
from megatron_riskpo.errors import RunError, UsageError
from megatron_riskpo.rollout.types import Rollouts


@dataclass(frozen=True)
class LogprobDifference:
    """Between the two models, over all tokens that have others before them; nats."""

    mean: float
    largest: float
    num_tokens: int


def compare_logprobs(folder: Path, source: Path, prompts: Sequence[str]) -> LogprobDifference:
    """transformers' model of `folder` against Megatron's with the weights of `source`, which is a Hugging Face folder,
    a run or a checkpoint. Megatron's own loader unpickles parts of a checkpoint: only for those that you trust.

    Raises UsageError for prompts of fewer than two tokens, RunError for a checkpoint that Megatron does not load.
    """
    tokenizer = load_tokenizer(folder, "HF_DIR")
    sequences = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    short = next((i for i, tokens in enumerate(sequences) if len(tokens) < 2), None)
    if short is not None:
        raise UsageError(f"prompt {short + 1} has {len(sequences[short])} tokens; two is the fewest with a log-prob")
    theirs = _transformers_logprobs(folder, sequences)
    ours = _megatron_logprobs(load_model_config(folder, "HF_DIR"), source, sequences)
    gaps = (ours - theirs).abs()
    return LogprobDifference(gaps.mean().item(), gaps.max().item(), gaps.numel())


def read_prompts(file: Path) -> list[str]:
    """Texts, one a line; of a .jsonl file the key `prompt` of each line. Raises UsageError."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
    except OSError as error:
        raise UsageError(f"--prompts {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {file}: is no UTF-8 text ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'--prompts {file}: not one {{"prompt": TEXT}} a line ({type(error).__name__}: {error})'
        ) from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(f"--prompts {file}: holds no prompt, or one that is no text")
    return prompts


@torch.no_grad()
def _transformers_logprobs(folder: Path, sequences: Sequence[list[int]]) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for tokens in map(torch.as_tensor, sequences):
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(-1, tokens[1:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def _megatron_logprobs(hf_config: dict[str, Any], source: Path, sequences: Sequence[list[int]]) -> Tensor:
    from megatron_riskpo.distributed import cpu_backend
    from megatron_riskpo.distributed.runtime import quieten_libraries

    cpu_backend.install()
    quieten_libraries()
    from megatron_riskpo.actor.model import build_policy_model
    from megatron_riskpo.actor.passes import run_passes
    from megatron_riskpo.actor.sequence_split import SequenceSplit

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        grid = build_grid(ActorConfig(), seed=0)
        chunks = build_policy_model(hf_config, ActorConfig(), torch.float32, grid)
        _load(chunks, hf_config, source, grid)
        for chunk in chunks:
            chunk.to(grid.device).eval()
        alone = [[index] for index in range(len(sequences))]
        passes = run_passes(chunks, _as_rollouts(sequences), alone, 1.0, SequenceSplit(1, 0, 1), grid.device, None)
        return torch.cat([one["logprobs"].cpu() for one in passes])
    finally:
        dist.destroy_process_group()


def _load(chunks: Sequence[Any], hf_config: dict[str, Any], source: Path, grid: RankGrid) -> None:
    from megatron_riskpo.checkpoint.hf import load_hf_weights

    if any(source.glob("*.safetensors")):
        load_hf_weights(chunks, source, family_of(hf_config), shape_of(hf_config), grid)
        return
    checkpoint = find_checkpoint(source, None, Team())
    load_weights(chunks, checkpoint / SHARDED if (checkpoint / SHARDED).is_dir() else checkpoint, grid)


def load_weights(chunks: Sequence[Any], folder: Path, grid: RankGrid) -> None:
    """Fill a model from a torch_dist folder by Megatron's own loader, whatever else is stored there. Collective; raises
    RunError."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    metadata = {"singleton_local_shards": False, "dp_cp_group": grid.dp_cp}
    for chunk in chunks:
        # Under a key of its own: what the ranks have in common, a run's optimizer settings, comes beside it.
        wanted = {"model": chunk.sharded_state_dict(metadata=metadata)}
        try:
            chunk.load_state_dict(cast(dict[str, Any], dist_checkpointing.load(wanted, str(folder)))["model"])
        except (CheckpointingException, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise RunError(f"{folder}: Megatron does not load it: {reason}") from error


def _as_rollouts(sequences: Sequence[list[int]]) -> Rollouts:
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    return Rollouts(
        tokens=torch.tensor([token for tokens in sequences for token in tokens]),
        prompt_lengths=torch.ones_like(lengths),
        response_lengths=lengths - 1,
        rollout_logprobs=torch.zeros(int(lengths.sum()) - len(sequences)),
        finished=torch.ones(len(sequences), dtype=torch.bool),
    )
