"""Find the program in a response."""

import re

FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)


def program_of(response: str, template: str | None = None) -> str | None:
    """The last fenced block; a response without a fence is a program as a whole, one whose last fence is not closed (it
    was cut) has none. `template`: a program in which {program} stands for that text."""
    block = last_fenced_block(response)
    if block is None:
        if FENCE.search(response):
            return None
        block = response.strip()
    if not block.strip():
        return None
    return template.replace("{program}", block) if template is not None else block


def last_fenced_block(text: str) -> str | None:
    """The content of the last fence that is closed, if no fence opens after it."""
    content: str | None = None
    opened: re.Match[str] | None = None
    for fence in FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            content, opened = text[opened.end() + 1 : fence.start()], None
    return None if opened is not None else content
