"""`riskpo train` on one rank: build the parts, run the loop, export, report."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_batches import too_few_questions
from megatron_riskpo.config_checks import max_sequence_length
from megatron_riskpo.config_io import resolved, write_run_record
from megatron_riskpo.config_servers import transport_of
from megatron_riskpo.data.mixture import MixedStream, make_stream
from megatron_riskpo.data.overlap import without_overlap
from megatron_riskpo.data.prompts import encode_prompts
from megatron_riskpo.data.questions import Question, load_evaluation_sets, load_split
from megatron_riskpo.data.stream import PromptStream
from megatron_riskpo.data.tokenizer import carry_tokenizer, load_tokenizer, stop_token_ids
from megatron_riskpo.distributed.grid import RankGrid
from megatron_riskpo.distributed.job import report_done
from megatron_riskpo.distributed.launch import RankEnv
from megatron_riskpo.distributed.runtime import rank_runtime
from megatron_riskpo.distributed.signals import StopSignal
from megatron_riskpo.errors import UsageError
from megatron_riskpo.observability.observer import Observer
from megatron_riskpo.resume import check_resume, without_outdated
from megatron_riskpo.rewards.from_config import check_sources, references_of
from megatron_riskpo.rewards.start import started_pool
from megatron_riskpo.rollout.source import RolloutSource
from megatron_riskpo.rollout.types import SamplingConfig
from megatron_riskpo.watchdog.watch import Watchdog

if TYPE_CHECKING:
    from megatron_riskpo.checkpoint.training_state import Checkpoint
    from megatron_riskpo.trainer import Trainer


def run_training(config: TrainConfig, env: RankEnv, stop: StopSignal) -> int:
    """Train, from the newest complete checkpoint if there is one. Exit code 0: done, or stopped by a signal."""
    run_dir = Path(config.run.dir) / config.run.name
    with (
        Watchdog(config.run, env) as watchdog,
        rank_runtime(env, config.run, config.actor) as grid,
        contextlib.ExitStack() as stack,
    ):
        from megatron_riskpo.checkpoint.training_state import agree_on_latest

        checkpoint = agree_on_latest(run_dir / "checkpoints", grid.world)
        changes = _accepted_changes(config, run_dir, checkpoint) if checkpoint is not None else {}
        start_step = checkpoint.step if checkpoint is not None else 0
        observer = Observer(run_dir, config.logging, config.run.steps, start_step, watchdog, is_writer=grid.rank == 0)
        trainer = _build(config, grid, stop, run_dir, start_step, observer, stack)
        if checkpoint is not None:
            _restore(trainer, checkpoint, changes)
        all_done = trainer.step >= config.run.steps
        if all_done:
            trainer.observer.log(f"all {config.run.steps} steps are done; nothing to train")
        elif grid.rank == 0:
            write_run_record(config, run_dir, env.world_size)
        completed = all_done or trainer.run()
        if completed:
            observer.enter("export")
            trainer.actor.save_hf(
                run_dir / "hf", lambda folder: carry_tokenizer(trainer.tokenizer, config.model.path, folder)
            )
    if grid.rank == 0:
        _conclude(run_dir, completed, trainer.step, config.run.steps)
    return 0


def _accepted_changes(config: TrainConfig, run_dir: Path, checkpoint: "Checkpoint") -> dict[str, str]:
    """As `check_resume`; UsageError, too, where run.resume wants no checkpoint."""
    if config.run.resume == "never":
        raise UsageError(
            f"{run_dir} holds {checkpoint.path.name}; "
            "choose another run.name, delete the folder, or set run.resume=auto"
        )
    return check_resume(config, checkpoint.path, checkpoint.document().get("config"))


def _restore(trainer: "Trainer", checkpoint: "Checkpoint", changes: dict[str, str]) -> None:
    """Go on from the checkpoint, and say what is otherwise than it was."""
    from megatron_riskpo.checkpoint.training_state import load_checkpoint, load_rollouts

    state, anew = without_outdated(load_checkpoint(checkpoint, trainer.actor), changes)
    # Under other options the same question may have other answers.
    asked_anew = any(key.startswith(("rollout.", "data.", "model.", "run.")) for key in changes)
    under_way = {} if asked_anew else load_rollouts(checkpoint, trainer.actor)
    trainer.restore(state, under_way)
    trainer.observer.log(f"resumed from {checkpoint.path} at step {trainer.step}")
    for key, change in changes.items():
        trainer.observer.log(f"changed since then: {key} {change}")
    if state["stream"] is not None and state["stream"].get("ahead") and not under_way:
        trainer.observer.log("responses under way are asked for again: the layout, or what is asked, has changed")
    if anew:
        trainer.observer.log(f"because of these changes start anew: {', '.join(anew)}")


def _build(
    config: TrainConfig, grid: RankGrid, stop: StopSignal, run_dir: Path, start_step: int, observer: Observer,
    stack: contextlib.ExitStack,
) -> Any:  # fmt: skip
    # Megatron may only be imported once rank_runtime has put the CPU backend in place.
    from megatron_riskpo.actor.actor import Actor
    from megatron_riskpo.actor.reference import reference_weights
    from megatron_riskpo.checkpoint.saver import CheckpointSaver
    from megatron_riskpo.objective import Objective
    from megatron_riskpo.resharding.bridge import Bridge
    from megatron_riskpo.trainer import Trainer

    observer.enter("questions")
    tokenizer = load_tokenizer(config.model.path)
    train_set, held_out, evaluation_sets = _question_sets(config, tokenizer, observer)
    # Before the model: a prompt and a grader that do not go together are found in seconds.
    sets = (train_set, held_out, *evaluation_sets.values())
    graded = [pair for part in sets for pair in zip(part.questions, part.references, strict=True)]
    check_sources(config.rewards, (question for question, _ in graded))
    pool = started_pool(config, graded, grid.world, observer.log, stack)
    stream = make_stream(
        train_set.questions, config.data.sources, config.data.prompts_per_step, config.run.seed,
        option="data.prompts_per_step",
    )  # fmt: skip
    shortage = too_few_questions(config, len(train_set.prompts))
    if shortage:
        raise UsageError(shortage)
    observer.enter("model")
    actor = Actor.from_hf(config.model.path, config.actor, config.optimizer, getattr(torch, config.model.dtype), grid)
    # Now: the actor's weights are those of model.path only until a checkpoint is loaded.
    reference = reference_weights(torch.nn.ModuleList(actor.chunks), config.loss)
    observer.enter("engine")
    engine = _build_engine(config, actor, grid, run_dir, observer, all_done=start_step >= config.run.steps)
    stack.callback(engine.close)
    saver = CheckpointSaver(
        run_dir / "checkpoints", config.checkpoint, resolved(config), grid,
        asynchronous=config.checkpoint.asynchronous, timeout_s=config.run.timeout_s,
    )  # fmt: skip
    stack.callback(saver.close)
    return Trainer(
        config=config,
        actor=actor,
        engine=engine,
        bridge=Bridge(actor, engine, config.bridge, config.run.seed, config.run.timeout_s),
        pool=pool,
        tokenizer=tokenizer,
        train_set=train_set,
        held_out=held_out,
        evaluation_sets=evaluation_sets,
        source=_build_source(config, engine, stream, train_set.prompts, stop_token_ids(config.model.path, tokenizer)),
        stop=stop,
        observer=stack.enter_context(observer),
        run_dir=run_dir,
        saver=saver,
        objective=Objective(config.algorithm, len(train_set.prompts)),
        reference=reference,
    )


def _question_sets(config: TrainConfig, tokenizer: Any, observer: Observer) -> tuple[Any, Any, dict[str, Any]]:
    """Training questions, none of which is in the others; held-out ones; further evaluation sets by name."""
    drawn, held_out = load_split(config.data, config.run.seed)
    further = load_evaluation_sets(config.data)
    train, overlapping = without_overlap(drawn, [q for questions in further.values() for q in questions])
    if overlapping:
        observer.log(f"training: left out {len(overlapping)} of {len(drawn)} questions that an evaluation set has")
    return (
        _encoded(train, "training", tokenizer, config, observer),
        _encoded(held_out, "held out", tokenizer, config, observer),
        {name: _encoded(questions, name, tokenizer, config, observer) for name, questions in further.items()},
    )


def _encoded(questions: list[Question], what: str, tokenizer: Any, config: TrainConfig, observer: Observer) -> Any:
    """Those of the questions whose prompt is short enough."""
    from megatron_riskpo.trainer import EncodedQuestions

    prompts, kept = encode_prompts(questions, tokenizer, config.data)
    if len(kept) < len(questions):
        num_left_out = len(questions) - len(kept)
        observer.log(f"{what}: left out {num_left_out} of {len(questions)} questions, prompt too long")
    chosen = [questions[i] for i in kept]
    return EncodedQuestions(prompts, chosen, references_of(chosen, config.rewards))


def _build_engine(
    config: TrainConfig, actor: Any, grid: RankGrid, run_dir: Path, observer: Observer, *, all_done: bool
) -> Any:
    max_length = max_sequence_length(config)
    # Where all steps are done nothing is sampled: the engine that costs nothing, not vLLM's start.
    if config.rollout.engine == "megatron" or all_done:
        from megatron_riskpo.rollout.megatron_engine import MegatronEngine

        return MegatronEngine(actor.chunks[0], grid, max_length, config.rollout.max_num_seqs)
    if config.rollout.placement == "server":
        from megatron_riskpo.resharding.actor_shards import ActorShards
        from megatron_riskpo.rollout.server_engine import ServerEngine

        return ServerEngine(
            config, vocab_size=actor.shape.vocab_size, world_group=grid.world, folder=run_dir / "servers",
            export=actor.export_weights, log=observer.log,
            shards=ActorShards.of(actor) if transport_of(config) != "file" else None,
        )  # fmt: skip
    from megatron_riskpo.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        config.model.path, config.rollout, dtype=config.model.dtype, max_model_len=max_length, world_group=grid.world,
        seed=config.run.seed,
    )  # fmt: skip


def _build_source(
    config: TrainConfig,
    engine: Any,
    stream: PromptStream | MixedStream,
    prompts: list[list[int]],
    stop_ids: tuple[int, ...],
) -> RolloutSource:  # fmt: skip
    rollout = config.rollout
    sampling = SamplingConfig(rollout.group_size, rollout.max_response_tokens, rollout.temperature, stop_ids)
    return RolloutSource(
        engine, stream, prompts, sampling, config.run.seed,
        max_staleness=rollout.max_staleness, num_steps=config.run.steps,
    )  # fmt: skip


def _conclude(run_dir: Path, completed: bool, step: int, num_steps: int) -> None:
    from megatron_riskpo.observability.report import summary_table, write_report

    report = write_report(run_dir)
    if not completed:
        print(f"stopped by a signal after step {step} of {num_steps}; run the same command to go on")
        return
    print(summary_table(run_dir))
    print(f"model: {run_dir / 'hf'}\nreport: {report}")
    report_done()
