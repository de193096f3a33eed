"""Whether two questions are the same but for how they are typeset: what must not be trained on and asked in the end."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from megatron_riskpo.data.sources import Question

# What changes the look of a formula and not its meaning. Digits, signs and words stay: 1 + 2 is not 1 - 2.
TYPESETTING = re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\[ ,;:!]|[\s$]|(?<=\\)[dt](?=frac)")


def normalised(text: str) -> str:
    """The text without case, spacing, $ and closing .?:=, with compatible Unicode characters made one."""
    return TYPESETTING.sub("", unicodedata.normalize("NFKC", text).casefold()).rstrip(".?:=")


def without_overlap(
    questions: Sequence[Question], held_out: Iterable[Question]
) -> tuple[list[Question], list[Question]]:
    """(those of `questions` whose normalised text no held-out question has, the others)."""
    known = {normalised(question.problem) for question in held_out}
    kept, removed = [], []
    for question in questions:
        (removed if normalised(question.problem) in known else kept).append(question)
    return kept, removed
