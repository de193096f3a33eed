"""The reward pool of a run, checked before anything is trained."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

from torch.distributed import ProcessGroup

from megatron_riskpo.config import PromptConfig, RewardConfig
from megatron_riskpo.data.prompts import prompt_messages
from megatron_riskpo.data.sources import Question
from megatron_riskpo.rewards.from_config import grader_options
from megatron_riskpo.rewards.gold_check import check_gold, gold_answers, spread, unasked_form
from megatron_riskpo.rewards.pool import GraderPool
from megatron_riskpo.rewards.reference import Reference, graders_of

Graded = tuple[Question, Reference]


class GradedConfig(Protocol):
    """A command's options that say how questions are asked and graded."""

    @property
    def data(self) -> PromptConfig: ...

    @property
    def rewards(self) -> RewardConfig: ...


def started_pool(
    config: GradedConfig, questions: Sequence[Graded], world: ProcessGroup, log: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> GraderPool:  # fmt: skip
    """A pool for all questions, which `stack` closes. Collective.

    Raises UsageError: a grader that cannot be used, programs to be graded and no sandbox that works, expected answers
    that do not grade 1.
    """
    options = grader_options(config.rewards)
    graders = graders_of(reference for _, reference in questions)
    pool = GraderPool(graders, config.rewards.workers, options, log)
    stack.callback(pool.close)
    pool.wait_until_started()
    data, form = config.data, config.rewards.answer_form
    chosen = (
        [questions[i] for i in spread(len(questions), config.rewards.gold_checks)] if config.rewards.gold_checks else []
    )
    # The system's message, too, may ask for a form.
    prompts = [
        "\n".join(message["content"] for message in messages)
        for messages in prompt_messages([question for question, _ in chosen], data)
    ]
    references = [reference for _, reference in chosen]
    check_gold(pool, gold_answers(prompts, [q.source for q, _ in chosen], references, form), form, world)
    warning = unasked_form(prompts, references, form)
    if warning:
        log(f"warning: {warning}")
    return pool
