"""Find a response's final answer, and decide the cases that need no mathematics.

Imports nothing but re: the pool runs this in the training process, on hostile text, so every step is linear in it.

The final answer of a response, finished or cut, is the first of these that there is:
1. the content of the complete \\boxed{...} (braces balanced) that starts last; a response that opens a box and
   closes none has no answer, since the cut may have gone through the number;
2. the rest of the line after the last "####";
3. the content of the last <answer>...</answer>;
4. the rest of the sentence or line after the last "answer is", "answer:" or "answer =";
5. the text after the last "=" of the last line that is not blank;
6. the last number in the text.
With the answer form "boxed", "hash" or "tag" only the first, second or third counts.
"""

import re

from megatron_riskpo.rewards.reference import AnswerForm

BOX = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)
HASH = "####"
TAG_START, TAG_END = "<answer>", "</answer>"
ANSWER_PHRASE = re.compile(r"answer\s{0,8}(?:is|:|=)\s{0,8}:?", re.IGNORECASE)
CLAUSE_END = re.compile(r"\n|[.;]\s|,\s(?=[A-Za-z])")
# A sign belongs to the number unless it follows an operand: "5-3" ends in 3, "= -3" in -3.
NUMBER = re.compile(r"(?:(?<![0-9)\]}])[+-])?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?")
INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")  # int() refuses more than 4,300 digits
# Behind an operand: the sign in (-2)^2 is none.
OPERATOR = re.compile(r"[0-9A-Za-z)\]}!]\s{0,8}(?:[+*/×÷−-]|\\(?:times|cdot|div|pm))")  # noqa: RUF001
WORDS = re.compile(r"\\(?:text|mathrm)\s{0,8}\{[^{}]*\}")  # the / of a unit
SCIENTIFIC = re.compile(r"[+-]?[0-9.]+\s*(?:\\times|\\cdot|×|\*)\s*10\s*(?:\^|\*\*)\s*\{?[+-]?[0-9]+\}?")  # noqa: RUF001
# Longer answers than this many characters are not graded as mathematics: no benchmark has one.
MAX_ANSWER_LENGTH = 1000


def final_answer(response: str, form: AnswerForm = "any") -> str | None:
    """The final answer's text by the rule above, without outer blanks, $ signs and a full stop; None: no answer."""
    found = _stated_answer(response, form)
    return _trimmed(found) if found is not None else None


def has_form(response: str, form: AnswerForm) -> bool:
    """Whether the response gives an answer in the form; "any" is every response's."""
    return form == "any" or _stated_answer(response, form) is not None


def quick_grade(response: str, expected_answer: str, form: AnswerForm = "any") -> float | None:
    """1.0 or 0.0 where text and integer comparison settle it, None where mathematics is needed.

    Against an integer, an answer that leaves a calculation to the grader ("57 - 87") is wrong: otherwise copying the
    question into the box would be the best policy.
    """
    answer, expected = final_answer(response, form), _trimmed(expected_answer)
    if answer is not None and answer == expected:
        return 1.0
    if answer is None or expected is None or len(answer) > MAX_ANSWER_LENGTH:
        return 0.0
    if INTEGER.fullmatch(expected):
        if INTEGER.fullmatch(answer):
            return float(int(answer) == int(expected))
        if _leaves_calculation(answer):
            return 0.0
    return None


def _stated_answer(response: str, form: AnswerForm) -> str | None:
    if form in ("any", "boxed"):
        boxed, has_box = _last_box(response)
        if has_box or form == "boxed":
            return boxed
    if form in ("any", "hash") and (HASH in response or form == "hash"):
        return response.rsplit(HASH, 1)[1].lstrip().split("\n", 1)[0] if HASH in response else None
    if form in ("any", "tag") and (TAG_START in response or form == "tag"):
        return _last_tag(response)
    return _answer_in_words(response)


def _answer_in_words(response: str) -> str | None:
    phrases = list(ANSWER_PHRASE.finditer(response))
    if phrases:
        return CLAUSE_END.split(response[phrases[-1].end() :].lstrip(" \t\n*"), maxsplit=1)[0]
    last_line = response.rstrip().rsplit("\n", 1)[-1]
    if "=" in last_line:
        return last_line.rsplit("=", 1)[1]
    numbers = NUMBER.findall(response)
    return numbers[-1] if numbers else None


def _last_tag(text: str) -> str | None:
    end = text.rfind(TAG_END)
    start = text.rfind(TAG_START, 0, end) if end >= 0 else -1
    return text[start + len(TAG_START) : end] if start >= 0 else None


def _last_box(text: str) -> tuple[str | None, bool]:
    """(content of the complete box that starts last, whether any box opens)."""
    content, content_start, has_box = None, -1, False
    open_braces: list[int | None] = []  # per open brace: where the content of its box starts, None for other braces
    for token in BOX.finditer(text):
        if token[0].startswith("\\boxed"):
            has_box = True
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and start > content_start:
                content, content_start = text[start : token.start()], start
    return content, has_box


def _leaves_calculation(answer: str) -> bool:
    """Whether an operator stands between operands; a leading sign and scientific notation are none."""
    return not SCIENTIFIC.fullmatch(answer) and OPERATOR.search(WORDS.sub("", answer)) is not None


def _trimmed(answer: str) -> str | None:
    return answer.strip().rstrip(".").strip().strip("$").strip() or None
