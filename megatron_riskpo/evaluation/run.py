"""`riskpo evaluate` on one rank: ask, grade, write; and the summary of what is written."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_riskpo.config import ActorConfig
from megatron_riskpo.config_io import load_model_config
from megatron_riskpo.data.tokenizer import load_tokenizer, stop_token_ids
from megatron_riskpo.distributed.job import report_done
from megatron_riskpo.distributed.launch import RankEnv
from megatron_riskpo.distributed.runtime import rank_runtime
from megatron_riskpo.distributed.signals import StopSignal, agree
from megatron_riskpo.errors import UsageError
from megatron_riskpo.evaluation.benchmarks import Benchmark, load_benchmarks
from megatron_riskpo.evaluation.generate import Sampler, Task, fill, pending_tasks
from megatron_riskpo.evaluation.nemo_metrics import metrics_path, write_metrics
from megatron_riskpo.evaluation.options import EvaluateConfig
from megatron_riskpo.evaluation.results import read_results
from megatron_riskpo.evaluation.settings import check_settings, note_servers, settings, write_settings
from megatron_riskpo.evaluation.summary import INTERVALS_FILE, summarize, table, write_intervals
from megatron_riskpo.rewards.from_config import references_of
from megatron_riskpo.rewards.start import started_pool
from megatron_riskpo.rollout.types import SamplingConfig

if TYPE_CHECKING:
    from megatron_riskpo.rollout.served_model import ServedModel
    from megatron_riskpo.rollout.vllm_engine import VllmEngine

BATCHES_PER_ENGINE = 4
"""Answers of a batch, in units of the sequences that the engines decode at a time: what a killed evaluation loses."""


def run_evaluation(
    config: EvaluateConfig, files: Sequence[Path], out: Path, first_seed: int, env: RankEnv, stop: StopSignal
) -> int:
    """Fill the outputs in `out`, then sum them up. Exit code 0: done, or stopped by a signal."""
    tokenizer = load_tokenizer(config.model.path, "--model")
    benchmarks = load_benchmarks(files, tokenizer, config.data)
    wanted = settings(config, benchmarks)
    check_settings(out, wanted)
    seeds = range(first_seed, first_seed + config.evaluation.num_samples)
    with rank_runtime(env, config.run, ActorConfig()) as grid:
        if grid.rank == 0:
            write_settings(out, wanted)
        greedy = config.evaluation.temperature == 0
        tasks = _shared(lambda: pending_tasks(out, benchmarks, seeds, greedy), grid.world)
        num_done = len(seeds) * sum(len(benchmark.lines) for benchmark in benchmarks.values()) - len(tasks)
        say = _reporter(grid.rank == 0, num_done)
        completed = not tasks or _ask(config, benchmarks, tasks, tokenizer, out, grid.world, stop, say)
    if env.rank == 0:
        if not completed:
            print(f"stopped by a signal; the answers so far are in {out}; run the same command to go on")
            return 0
        conclude(out)
        report_done()
    return 0


def conclude(folder: Path, target: Path | None = None) -> None:
    """Print the table of all outputs in `folder`, write metrics.json and intervals.json there, or in `target`. Raises
    UsageError rather than replace another program's metrics.json, unless `target` names its folder."""
    found = read_results(folder)
    if target is None:
        _check_own_metrics(folder)
    summaries = {results.name: summarize(results) for results in found}
    target = target or folder
    target.mkdir(parents=True, exist_ok=True)
    print(table(summaries))
    intervals = write_intervals(target, summaries)
    print(f"metrics: {write_metrics(target, found)}\nintervals: {intervals}")


def _check_own_metrics(folder: Path) -> None:
    """What we write has intervals.json beside it."""
    metrics = metrics_path(folder)
    if metrics.exists() and not (folder / INTERVALS_FILE).is_file():
        raise UsageError(
            f"{metrics} is not riskpo's (there is no {folder / INTERVALS_FILE}); give --out DIR for the new files, or "
            f"--out {folder} to replace it"
        )


def max_model_len(config: EvaluateConfig) -> int:
    """Positions that the engine needs. Raises UsageError where the model has fewer."""
    needed = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    limit = load_model_config(config.model.path, "--model").get("max_position_embeddings", needed)
    if needed > limit:
        raise UsageError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {config.data.max_prompt_tokens} + "
            f"{config.rollout.max_response_tokens} = {needed} exceeds the model's max_position_embeddings = {limit}; "
            f"lower one of them by {needed - limit}"
        )
    return needed


def _ask(
    config: EvaluateConfig, benchmarks: dict[str, Benchmark], tasks: list[Task], tokenizer: Any, out: Path,
    world: ProcessGroup, stop: StopSignal, say: Callable[[str], None],
) -> bool:  # fmt: skip
    questions = [question for benchmark in benchmarks.values() for question in benchmark.questions]
    with ExitStack() as stack:
        graded = list(zip(questions, references_of(questions, config.rewards), strict=True))
        # What is wrong with a server is known at once; vLLM in this process takes longer to start than the graders.
        served = stack.enter_context(closing(_served(config, out, world, say))) if config.rollout.server_urls else None
        pool = started_pool(config, graded, world, say, stack)
        engine = served or stack.enter_context(closing(_in_process(config, world)))
        sampling = SamplingConfig(
            group_size=1,
            max_response_tokens=config.rollout.max_response_tokens,
            temperature=config.evaluation.temperature,
            stop_token_ids=stop_token_ids(config.model.path, tokenizer),
        )
        sampler = Sampler(engine, sampling, tokenizer, pool, config.rewards, world)
        num_engines = len(config.rollout.server_urls) or world.size() // config.rollout.tp
        batch_size = BATCHES_PER_ENGINE * config.rollout.max_num_seqs * num_engines
        return fill(out, benchmarks, tasks, sampler, batch_size, lambda: agree(stop, world), say)


def _served(config: EvaluateConfig, out: Path, world: ProcessGroup, say: Callable[[str], None]) -> "ServedModel":
    from megatron_riskpo.rollout.served_model import ServedModel

    vocab_size = load_model_config(config.model.path, "--model")["vocab_size"]
    served = ServedModel(
        Path(config.model.path), config.rollout.server_urls, config.server, max_model_len=max_model_len(config),
        vocab_size=vocab_size, world_group=world, timeout_s=config.run.timeout_s, log=say,
    )  # fmt: skip
    if world.rank() == 0:
        note_servers(out, {url: asdict(card) for url, card in served.cards.items()})
    return served


def _in_process(config: EvaluateConfig, world: ProcessGroup) -> "VllmEngine":
    from megatron_riskpo.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        config.model.path, config.rollout, dtype=config.model.dtype, max_model_len=max_model_len(config),
        world_group=world, seed=config.run.seed, load_checkpoint=True,
    )  # fmt: skip


def _shared(make: Callable[[], list[Task]], world: ProcessGroup) -> list[Task]:
    """What rank 0 makes of the files, on every rank; its UsageError as well."""
    box: list[Any] = [None]
    if world.rank() == 0:
        try:
            box = [make()]
        except UsageError as error:
            box = [error]
    dist.broadcast_object_list(box, group=world, group_src=0)
    if isinstance(box[0], UsageError):
        raise box[0]
    return box[0]


def _reporter(is_writer: bool, num_done: int) -> Callable[[str], None]:
    if is_writer and num_done:
        print(f"{num_done} answers were there already", flush=True)
    return lambda line: print(line, flush=True) if is_writer else None
