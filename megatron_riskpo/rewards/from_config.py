"""From the configuration and the questions to what the graders take."""

from collections.abc import Iterable

from megatron_riskpo.config import RewardConfig
from megatron_riskpo.data.sources import Question
from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.options import CodeOptions, GraderOptions
from megatron_riskpo.rewards.reference import Reference, reference


def grader_options(config: RewardConfig) -> GraderOptions:
    """[rewards] as the graders take it."""
    code = CodeOptions(
        backend=config.sandbox,
        url=config.sandbox_url,
        test_cpu_s=config.test_cpu_s,
        program_timeout_s=config.program_timeout_s,
        memory_mib=config.test_memory_mib,
        partial_credit=config.partial_credit,
    )
    return GraderOptions(
        answer_form=config.answer_form, tolerance=config.tolerance, timeout_s=config.timeout_s, cpu_s=config.cpu_s,
        memory_gib=config.memory_gib, code=code,
    )  # fmt: skip


def references_of(questions: Iterable[Question], config: RewardConfig) -> list[Reference]:
    """What the responses to each question are graded by. Raises UsageError: see reference()."""
    return [
        reference(q.expected_answer, q.data_source, q.fields, config.grader, config.graders, q.source)
        for q in questions
    ]


def check_sources(config: RewardConfig, questions: Iterable[Question]) -> None:
    """Raise UsageError where rewards.graders names a source that no question has: its grader would grade nothing."""
    sources = {question.data_source for question in questions}
    unknown = sorted(config.graders.keys() - sources)
    if unknown:
        raise UsageError(
            f"rewards.graders names {unknown[0]!r}, the source of no question (there are: "
            f"{', '.join(sorted(sources))}); correct the name or take it out"
        )
