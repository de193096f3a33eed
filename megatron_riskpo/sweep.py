"""A sweep: a file with the options of one run a line."""

import shlex
from pathlib import Path

from megatron_riskpo.errors import UsageError


def read_sweep(file: Path) -> list[list[str]]:
    """The words of each line that is neither empty nor a comment (#), as slurm/sweep.sbatch reads them: split at
    spaces, quotes keep words together, nothing is expanded. Raises UsageError."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--sweep {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UsageError(f"--sweep {file} has no line of options; write one a run, for example --optimizer.lr 1e-6")
    try:
        words = [shlex.split(line) for line in lines]
        for line, as_python in zip(lines, words, strict=True):
            if as_python != _as_xargs(line):
                raise UsageError(
                    f"--sweep {file}: a backslash within double quotes is read in more than one way; "
                    f"take single quotes: {line}"
                )
    except ValueError as error:
        raise UsageError(f"--sweep {file}: {error}; close the quotes") from error
    return words


def _as_xargs(line: str) -> list[str]:
    """The words as sweep.sbatch has them: a backslash within quotes is one like any other character."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escapedquotes = True, "", ""
    return list(lexer)
