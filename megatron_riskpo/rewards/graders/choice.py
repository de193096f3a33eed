"""Multiple choice: the letter of an option, or the option's text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_riskpo.rewards.answers import final_answer
from megatron_riskpo.rewards.graders.text import plain
from megatron_riskpo.rewards.reference import AnswerForm

# "B", "(B)", "B.", "B) 12", "[b]": one letter, alone or before the option's text.
LETTER = re.compile(r"[(\[]?([A-Za-z])[)\].:]*(?:\s.*)?", re.DOTALL)
STANDALONE = re.compile(r"(?<![A-Za-z])\(?([A-Z])\)?(?![A-Za-z'])")


@dataclass(frozen=True)
class ChoiceGrader:
    """1.0 if the response chooses the option of the expected letter, else 0.0.

    The field `choices`, a list of texts (A is the first), lets a response give the option's text in place of its
    letter. With the form "any", a response that states no answer is read for the last capital letter that stands alone
    in its last line.
    """

    form: AnswerForm = "any"

    def __call__(self, response: str, expected_answer: str, fields: Mapping[str, Any]) -> float:
        choices = [plain(str(choice)) for choice in fields.get("choices", ())]
        expected = _letter(plain(expected_answer), choices)
        if expected is None:
            raise ValueError(f"the expected answer {expected_answer!r:.60} is no option's letter or text")
        return float(self._chosen(response, choices) == expected)

    def _chosen(self, response: str, choices: list[str]) -> str | None:
        answer = final_answer(response, self.form)
        letter = _letter(plain(answer), choices) if answer is not None else None
        if letter is not None or self.form != "any" or "\\boxed" in response:
            return letter
        standing = STANDALONE.findall(response.rstrip().rsplit("\n", 1)[-1])
        return standing[-1] if standing else None


def _letter(answer: str, choices: list[str]) -> str | None:
    """The option that the answer names; its text counts only where it is one option's alone."""
    if choices.count(answer) == 1:
        return chr(ord("A") + choices.index(answer))
    found = LETTER.fullmatch(answer)
    # "a cat" starts with a letter, and names no option by it.
    if found is None or (" " in answer and answer[1:2] == " "):
        return None
    return found[1].upper()
