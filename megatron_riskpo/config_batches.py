"""Rules about how many sequences a step has, and how they split (config_checks.py joins them to the others)."""

from megatron_riskpo.config import TrainConfig
from megatron_riskpo.config_rules import Setup, multiples
from megatron_riskpo.data.sources import GYM_PREFIX


def dynamic_sampling(setup: Setup) -> str | None:
    config = setup.config
    if config.rollout.dynamic_sampling and config.rollout.group_size < 2:
        return (
            f"rollout.dynamic_sampling keeps questions whose rewards differ, rollout.group_size = "
            f"{config.rollout.group_size} gives one response each; set it to 2 or more, or dynamic_sampling to false"
        )
    # A file's questions are counted when they are read.
    is_task = config.data.train.startswith(GYM_PREFIX) and not config.data.sources
    return too_few_questions(config, config.data.train_size) if is_task else None


def too_few_questions(config: TrainConfig, num_questions: int) -> str | None:
    """What to say where a step of dynamic sampling could draw a question twice. (Fewer questions than one draw takes
    are refused with or without dynamic sampling: PromptStream.)"""
    prompts, refills = config.data.prompts_per_step, config.rollout.max_refills
    if not config.rollout.dynamic_sampling or not prompts <= num_questions < (1 + refills) * prompts:
        return None
    return (
        f"rollout.max_refills = {refills} may draw {1 + refills} times data.prompts_per_step = {prompts} questions a "
        f"step, but there are {num_questions} training questions; use {num_questions // prompts - 1} or fewer"
    )


def mini_batches(setup: Setup) -> str | None:
    num, prompts, rollout = setup.config.actor.mini_batches, setup.config.data.prompts_per_step, setup.config.rollout
    if prompts % num:
        return (
            f"data.prompts_per_step = {prompts} cannot be split into actor.mini_batches = {num}, whole groups "
            f"together; use {multiples(num, prompts)} prompts"
        )
    size = prompts // num * rollout.group_size
    longest = setup.config.data.max_prompt_tokens + rollout.max_response_tokens
    return _unsplittable(
        setup, f"data.prompts_per_step = {prompts} makes mini-batches of {size} responses, which", size, longest
    )


def sft_batch(setup: Setup) -> str | None:
    size = setup.config.sft.batch_size
    return _unsplittable(setup, f"sft.batch_size = {size}", size, setup.model["max_position_embeddings"])


def _unsplittable(setup: Setup, what: str, size: int, longest: int) -> str | None:
    """What to say where a batch may have too few sequences (of at most `longest` tokens) for equally many micro-batches
    on all ranks. Shares of one size always do; others, where any two sequences fit into a micro-batch."""
    actor, dp = setup.config.actor, setup.data_parallel
    # Interleaved stages take micro-batches in groups of pp, each of which needs a sequence.
    group = actor.pp if actor.vp > 1 else 1
    least = dp * group
    share = 2 * -(-longest // (2 * actor.cp)) if actor.cp > 1 else longest
    if size % least == 0 or (size > least and 2 * share <= actor.micro_batch_tokens):
        return None
    remedy = f"use {multiples(least, size)}"
    if size > least:
        remedy += f", or actor.micro_batch_tokens = {2 * share}, so that any two sequences fit into a micro-batch"
    groups = f" in groups of actor.pp = {actor.pp} micro-batches" if group > 1 else ""
    return f"{what} cannot be split over {dp} data-parallel ranks{groups}; {remedy}"
