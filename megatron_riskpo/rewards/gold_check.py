"""Do prompt and grader mean the same form of answer? Found out before the run, on the expected answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_riskpo.errors import UsageError
from megatron_riskpo.rewards.pool import Grade, GraderPool
from megatron_riskpo.rewards.reference import BUILT_IN, AnswerForm, Reference

BOXED, HASH, TAG, FENCE = "\\boxed{ANSWER}", "#### ANSWER", "<answer>ANSWER</answer>", "```\nANSWER\n```"
ASKED_BY = {"\\boxed": BOXED, "####": HASH, "<answer>": TAG, "```": FENCE}
"""What a prompt says, and the form that it thereby asks for."""
SIGN_OF = {form: sign for sign, form in ASKED_BY.items()}
OF_FORM: dict[AnswerForm, str] = {"boxed": BOXED, "hash": HASH, "tag": TAG, "any": BOXED}
MAX_EXAMPLES = 3
WRONG_REMEDY = (
    "make the prompt ask for what the grader reads (rewards.answer_form, rewards.grader), or correct the answers"
)
ERRORS_REMEDY = "all were errors: mend the grader (or start its server), or the answers that it cannot read"


@dataclass(frozen=True)
class GoldAnswer:
    """An expected answer, as a response to its prompt would give it."""

    place: str
    """Where the question comes from, for errors."""
    form: str
    """One of the forms above, ANSWER in place of the answer."""
    reference: Reference

    @property
    def response(self) -> str:
        return self.form.replace("ANSWER", self.reference.expected_answer)


def gold_answers(
    prompts: Sequence[str], places: Sequence[str], references: Sequence[Reference], answer_form: AnswerForm
) -> list[GoldAnswer]:
    """Each in a form that its source's prompts ask for: in the one that the grader reads where that is among them, or
    where they ask for none. One place and one reference a prompt."""
    of_source: dict[str, list[str]] = {}
    for prompt, ref in zip(prompts, references, strict=True):
        of_source.setdefault(ref.source, []).append(prompt)
    asked = {source: _asked_forms(own) for source, own in of_source.items()}
    return [
        GoldAnswer(place, _form(asked[ref.source], ref, answer_form), ref)
        for place, ref in zip(places, references, strict=True)
    ]


def _asked_forms(prompts: Sequence[str]) -> list[str]:
    """Those whose sign most of the prompts have: what only some have is in the questions' own text."""
    return [form for sign, form in ASKED_BY.items() if 2 * sum(sign in prompt for prompt in prompts) > len(prompts)]


def _form(asked: Sequence[str], reference: Reference, answer_form: AnswerForm) -> str:
    if reference.grader == "code":
        return "ANSWER" if "program_template" in reference.fields and FENCE not in asked else FENCE
    read = OF_FORM[answer_form]
    return read if read in asked or not asked else asked[0]


def unasked_form(prompts: Sequence[str], references: Sequence[Reference], answer_form: AnswerForm) -> str | None:
    """What to say of prompts that do not name the form of answer (they may in words) where graders count one only. No
    error: a model may have learned the form. One reference a prompt."""
    if answer_form == "any":
        return None
    reading = [p for p, ref in zip(prompts, references, strict=True) if ref.grader in BUILT_IN and ref.grader != "code"]
    read = OF_FORM[answer_form]
    silent = [prompt for prompt in reading if SIGN_OF[read] not in prompt]
    if not silent:
        return None
    return (
        f"{len(silent)} of {len(reading)} prompts do not name {SIGN_OF[read]}, and with rewards.answer_form = "
        f"{answer_form} only {read} is an answer: unless the model has learned it, ask for it in the prompt, or set "
        f"rewards.answer_form = any; for example {silent[0][-80:]!r}"
    )


def spread(num: int, limit: int) -> list[int]:
    """At most `limit` of the indices 0 .. num - 1, evenly spread."""
    return sorted({index * num // limit for index in range(limit)}) if limit < num else list(range(num))


def check_gold(pool: GraderPool, answers: Sequence[GoldAnswer], answer_form: AnswerForm, world: ProcessGroup) -> None:
    """Raise UsageError, on every rank, unless all answers grade 1 or more (those without one are left out).
    Collective: every rank grades its share."""
    mine = [answer for answer in answers if answer.reference.expected_answer][world.rank() :: world.size()]
    grades = pool.score([answer.response for answer in mine], [answer.reference for answer in mine])
    # "not >=": an error is NaN.
    failed = [(answer, grade) for answer, grade in zip(mine, grades, strict=True) if not grade.score >= 1]
    counts = torch.tensor([len(failed), sum(grade.error is not None for _, grade in failed), len(mine)])
    dist.all_reduce(counts, group=world)
    if counts[0]:
        examples: list[list[str]] = [[]] * world.size()
        # All ranks say the same, which is shown once.
        dist.all_gather_object(examples, [_complaint(*pair, answer_form) for pair in failed[:MAX_EXAMPLES]], world)
        shown = [example for own in examples for example in own][:MAX_EXAMPLES]
        remedy = ERRORS_REMEDY if counts[0] == counts[1] else WRONG_REMEDY
        raise UsageError(
            f"{counts[0]} of {counts[2]} expected answers, given as the prompt asks for them, do not grade 1: "
            f"{'; '.join(shown)}; {remedy} (rewards.gold_checks = 0 skips this check)"
        )


def _complaint(answer: GoldAnswer, grade: Grade, answer_form: AnswerForm) -> str:
    got = grade.error if grade.error is not None else f"{grade.score:g}"
    grader = f"{answer.reference.grader} (answer form {answer_form})"
    return f"{answer.place}: {answer.response!r:.120} gets {got} from {grader}"
