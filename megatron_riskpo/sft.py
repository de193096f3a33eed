"""`riskpo sft`: warm-start a model on solved examples with the same Megatron actor; the base model of an RL run."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_riskpo import __version__
from megatron_riskpo.config import LoggingConfig
from megatron_riskpo.config_io import load_model_config, resolved, write_run_record
from megatron_riskpo.config_sft import ModelShapeConfig, SftConfig
from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model
from megatron_riskpo.data.prompts import check_template, prompt_text
from megatron_riskpo.data.questions import Question, load_questions
from megatron_riskpo.data.sources import GYM_PREFIX
from megatron_riskpo.data.stream import PromptStream
from megatron_riskpo.data.tokenizer import carry_tokenizer, load_tokenizer
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.distributed.launch import RankEnv
from megatron_riskpo.distributed.runtime import rank_runtime
from megatron_riskpo.distributed.signals import StopSignal, agree
from megatron_riskpo.errors import RunError
from megatron_riskpo.observability.observer import Observer
from megatron_riskpo.rollout.types import Rollouts
from megatron_riskpo.watchdog.watch import Watchdog

RECORD_EVERY = 20
SENTENCEPIECE_MODEL = "tokenizer.model"
MADE_FROM = "made_from.json"
"""Beside hf/: what the model came from, by which the next run knows that it may re-use it."""


def run_sft(config: SftConfig, env: RankEnv, stop: StopSignal) -> int:
    """Train and export to runs/NAME/hf, or re-use what an equal configuration left there. Exit code 0.

    Raises RunError when a signal ends it: nothing is exported then, and what would use the model must not go on.
    """
    run_dir = Path(config.run.dir) / config.run.name
    with Watchdog(config.run, env) as watchdog, rank_runtime(env, config.run, config.actor) as grid:
        identity = _identity(config, env.world_size)
        if _is_made(run_dir, identity):
            if grid.rank == 0:
                print(f"{run_dir / 'hf'} was made from the same options and data; re-using it")
                print(f"(delete {run_dir} to make it anew)")
            return 0
        if grid.rank == 0:
            # From here on hf/ may be older than this configuration.
            (run_dir / MADE_FROM).unlink(missing_ok=True)
        _make(config, grid, stop, run_dir, watchdog)
        if grid.rank == 0:
            write_run_record(config, run_dir, env.world_size)
            (run_dir / MADE_FROM).write_text(json.dumps(identity, indent=2))
            print(f"model: {run_dir / 'hf'}")
        dist.barrier()
    return 0


def _make(config: SftConfig, grid: RankGrid, stop: StopSignal, run_dir: Path, watchdog: Watchdog) -> None:
    from megatron_riskpo.actor.actor import Actor, summarize_steps, supervised_loss

    watchdog.enter("model")
    data = config.data
    examples = load_questions(data.train, size=data.train_size, seed=config.run.seed, options=data.options)
    check_template(data.prompt_template, "problem")
    for template in data.response_templates:
        check_template(template, "answer")
    forms = np.random.default_rng(config.run.seed).choice(data.response_templates, len(examples))
    texts = [_texts(example, form, config) for example, form in zip(examples, forms.tolist(), strict=True)]
    tokenizer_dir = Path(config.model.path or run_dir)
    if not config.model.path and grid.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        train_character_model([p + r for p, r in texts], run_dir / SENTENCEPIECE_MODEL)
    dist.barrier()
    tokenizer = load_tokenizer(tokenizer_dir) if config.model.path else qwen2_tokenizer(run_dir / SENTENCEPIECE_MODEL)
    hf_config = load_model_config(config.model.path) if config.model.path else _qwen2_config(config.shape, tokenizer)
    encoded = [(tokenizer.encode(p), [*tokenizer.encode(r), tokenizer.eos_token_id]) for p, r in texts]
    stream = PromptStream(len(encoded), config.sft.batch_size, config.run.seed, option="sft.batch_size")
    actor = Actor(
        hf_config, config.actor, config.optimizer, getattr(torch, config.model.dtype), grid, config.model.path or None
    )
    with Observer(run_dir, LoggingConfig(), config.sft.steps, 0, watchdog, is_writer=grid.rank == 0) as observer:
        recent: list[dict[str, float]] = []
        for step in range(1, config.sft.steps + 1):
            batch = solved_examples([encoded[row] for row in stream.next_batch()])
            with observer.phase("update"):
                _, metrics = actor.train_step(batch, supervised_loss(batch), 1.0, config.sft.steps)
            recent.append(metrics)
            if metrics["actor/skipped_steps"]:
                observer.log(f"step {step}: optimizer step skipped, its gradients were not finite")
            if step % RECORD_EVERY == 0 or step == config.sft.steps:
                observer.record(step, summarize_steps(recent))
                recent.clear()
            if step < config.sft.steps and agree(stop, grid.world):
                raise RunError(
                    f"stopped by a signal after step {step} of {config.sft.steps}; no model was exported; "
                    "run the same command to start anew"
                )
    watchdog.enter("export")
    actor.save_hf(run_dir / "hf", lambda folder: carry_tokenizer(tokenizer, tokenizer_dir, folder))


def solved_examples(pairs: Sequence[tuple[list[int], list[int]]]) -> Rollouts:
    """(prompt, response) token ids as the batch that the actor takes."""
    tokens = torch.tensor([token for prompt, response in pairs for token in (*prompt, *response)])
    response_lengths = torch.tensor([len(response) for _, response in pairs])
    return Rollouts(
        tokens=tokens,
        prompt_lengths=torch.tensor([len(prompt) for prompt, _ in pairs]),
        response_lengths=response_lengths,
        rollout_logprobs=torch.zeros(int(response_lengths.sum())),
        finished=torch.ones(len(pairs), dtype=torch.bool),
    )


def _texts(example: Question, response_template: str, config: SftConfig) -> tuple[str, str]:
    prompt = prompt_text(example.problem, config.data.strip_prefix, config.data.prompt_template)
    return prompt, example.solution or response_template.format(answer=example.expected_answer)


def _qwen2_config(shape: ModelShapeConfig, tokenizer: Any) -> dict[str, Any]:
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        initializer_range=shape.initializer_range,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tied_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {**config.to_dict(), "architectures": ["Qwen2ForCausalLM"]}


def _identity(config: SftConfig, world_size: int) -> dict[str, Any]:
    """What decides the weights: the options (but where the run lives and how long it may wait), the files that they
    name, the number of ranks and the code's version. JSON-able."""
    run = dataclasses.replace(config.run, dir="", timeout_s=0.0, stall_limit_s=0.0)
    files = {}
    if not config.data.train.startswith(GYM_PREFIX) and Path(config.data.train).is_file():
        files["data"] = _digest(Path(config.data.train))
    if config.model.path:
        base = Path(config.model.path)
        files["model"] = _digest(base / "config.json")
        files |= {path.name: path.stat().st_size for path in sorted(base.glob("*.safetensors"))}
    return {
        "options": resolved(dataclasses.replace(config, run=run)),
        "files": files,
        "world_size": world_size,
        "version": __version__,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_made(run_dir: Path, identity: dict[str, Any]) -> bool:
    try:
        made_from = json.loads((run_dir / MADE_FROM).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return made_from == identity and (run_dir / "hf" / "config.json").is_file()
