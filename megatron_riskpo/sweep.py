"""A sweep: a file with the options of one run a line."""

import shlex
from pathlib import Path

from megatron_riskpo.errors import UsageError


def read_sweep(file: Path) -> list[list[str]]:
    """The words of each line that is neither empty nor a comment (#), as slurm/sweep.sbatch has xargs read them: split
    at spaces, quotes keep words together, a backslash within them is one like any other character, nothing is
    expanded. Raises UsageError."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--sweep {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UsageError(f"--sweep {file} has no line of options; write one a run, for example --optimizer.lr 1e-6")
    try:
        return [_words(line) for line in lines]
    except ValueError as error:
        raise UsageError(f"--sweep {file}: {error}; close the quotes") from error


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escapedquotes = True, "", ""
    return list(lexer)
