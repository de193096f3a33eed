"""Find a response's final answer, and decide the cases that need no mathematics.

Imports nothing but re: the pool runs this in the training process, on hostile text, so every step is linear in it.

The final answer of a response, finished or cut, is the first of these that there is:
1. the content of the complete \\boxed{...} (braces balanced) that starts last; a response that opens a box and
   closes none has no answer, since the cut may have gone through the number;
2. the rest of the sentence or line after the last "answer is", "answer:" or "answer =";
3. the text after the last "=" of the last line that is not blank;
4. the last number in the text.
"""

import re

BOX = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)
ANSWER_PHRASE = re.compile(r"answer\s{0,8}(?:is|:|=)\s{0,8}:?", re.IGNORECASE)
CLAUSE_END = re.compile(r"\n|[.;]\s|,\s(?=[A-Za-z])")
# A sign belongs to the number unless it follows an operand: "5-3" ends in 3, "= -3" in -3.
NUMBER = re.compile(r"(?:(?<![0-9)\]}])[+-])?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?")
INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")  # int() refuses more than 4,300 digits
OPERATOR = re.compile(r"[+*/×÷−-]|\\(?:times|cdot|div|pm)")  # noqa: RUF001
SCIENTIFIC = re.compile(r"[+-]?[0-9.]+\s*(?:\\times|\\cdot|×|\*)\s*10\s*(?:\^|\*\*)\s*\{?[+-]?[0-9]+\}?")  # noqa: RUF001
# Longer answers than this many characters are not graded as mathematics: no benchmark has one.
MAX_ANSWER_LENGTH = 1000


def final_answer(response: str) -> str | None:
    """The final answer's text by the rule above, without outer blanks, $ signs and a full stop; None: no answer."""
    boxed, has_box = _last_box(response)
    if has_box:
        return _trimmed(boxed) if boxed is not None else None
    phrases = list(ANSWER_PHRASE.finditer(response))
    if phrases:
        return _trimmed(CLAUSE_END.split(response[phrases[-1].end() :].lstrip(), maxsplit=1)[0])
    last_line = response.rstrip().rsplit("\n", 1)[-1]
    if "=" in last_line:
        return _trimmed(last_line.rsplit("=", 1)[1])
    numbers = NUMBER.findall(response)
    return _trimmed(numbers[-1]) if numbers else None


def boxed_or_nothing(response: str) -> str:
    """The response, or an empty one (no answer) if it holds no complete box."""
    return response if _last_box(response)[0] is not None else ""


def quick_grade(response: str, expected_answer: str) -> float | None:
    """1.0 or 0.0 where text and integer comparison settle it, None where mathematics is needed.

    Against an integer, an answer that leaves a calculation to the grader ("57 - 87") is wrong: otherwise copying the
    question into the box would be the best policy.
    """
    answer, expected = final_answer(response), _trimmed(expected_answer)
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
    return not SCIENTIFIC.fullmatch(answer) and OPERATOR.search(answer, 1) is not None


def _trimmed(answer: str) -> str | None:
    return answer.strip().rstrip(".").strip().strip("$").strip() or None
