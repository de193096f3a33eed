"""`riskpo sft`: warm-start a model on solved examples with the same Megatron actor; the base model of an RL run."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_riskpo.config import LoggingConfig, ModelShapeConfig, SftConfig
from megatron_riskpo.config_io import load_model_config, resolved, write_run_record
from megatron_riskpo.data.character_tokenizer import qwen2_tokenizer, train_character_model
from megatron_riskpo.data.prompts import check_template, prompt_text
from megatron_riskpo.data.questions import Question, load_questions
from megatron_riskpo.data.stream import PromptStream
from megatron_riskpo.data.tokenizer import carry_tokenizer, load_tokenizer
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.distributed.launch import RankEnv
from megatron_riskpo.distributed.runtime import rank_runtime
from megatron_riskpo.distributed.signals import StopSignal, agree
from megatron_riskpo.observability.observer import Observer
from megatron_riskpo.rollout.types import Rollouts

RECORD_EVERY = 20
SENTENCEPIECE_MODEL = "tokenizer.model"
MADE_FROM = "made_from.json"
"""Beside hf/: the options the model came from, by which the next run knows that it may re-use it."""


def run_sft(config: SftConfig, env: RankEnv, stop: StopSignal) -> int:
    """Train and export to runs/NAME/hf, or re-use what an equal configuration left there. Exit code 0."""
    run_dir = Path(config.run.dir) / config.run.name
    with rank_runtime(env, config.run, config.actor) as grid:
        if _is_made(run_dir, config):
            if grid.rank == 0:
                print(
                    f"{run_dir / 'hf'} was made from the same options; re-using it (delete {run_dir} to make it anew)"
                )
            return 0
        completed = _make(config, grid, stop, run_dir)
        dist.barrier()
    if grid.rank == 0:
        print(f"model: {run_dir / 'hf'}" if completed else "stopped by a signal; nothing was exported")
    return 0


def _make(config: SftConfig, grid: RankGrid, stop: StopSignal, run_dir: Path) -> bool:
    from megatron_riskpo.actor.actor import Actor, supervised_loss

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
    actor = Actor(
        hf_config, config.actor, config.optimizer, getattr(torch, config.model.dtype), grid, config.model.path or None
    )
    stream = PromptStream(len(encoded), config.sft.batch_size, config.run.seed)
    is_writer = grid.rank == 0
    with Observer(run_dir, LoggingConfig(), config.sft.steps, 0, is_writer) as observer:
        losses: list[float] = []
        for step in range(1, config.sft.steps + 1):
            batch = solved_examples([encoded[row] for row in stream.next_batch()])
            with observer.phase("update"):
                _, metrics = actor.train_step(batch, supervised_loss(batch), 1.0, config.sft.steps)
            losses.append(metrics["sft/loss"])
            if step % RECORD_EVERY == 0 or step == config.sft.steps:
                observer.record(step, metrics | {"sft/loss": sum(losses) / len(losses)})
                losses.clear()
            if agree(stop, grid.world):
                return False
    actor.save_hf(run_dir / "hf", lambda folder: carry_tokenizer(tokenizer, tokenizer_dir, folder))
    if is_writer:
        write_run_record(config, run_dir)
        (run_dir / MADE_FROM).write_text(json.dumps(_identity(config), indent=2))
    return True


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


def _identity(config: SftConfig) -> dict[str, Any]:
    """The options that decide the weights: all but where the run lives and how long it may wait."""
    options = resolved(dataclasses.replace(config, run=dataclasses.replace(config.run, dir="", timeout_s=0.0)))
    return json.loads(json.dumps(options))


def _is_made(run_dir: Path, config: SftConfig) -> bool:
    try:
        made_from = json.loads((run_dir / MADE_FROM).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return made_from == _identity(config) and (run_dir / "hf" / "config.json").is_file()
