"""Errors meant for the user: one line that says what was wrong, the numbers, and the remedy."""

from pathlib import Path


class RiskpoError(Exception):
    """An error whose message is shown without a traceback; `exit_code` is the process's exit code."""

    exit_code = 1


class UsageError(RiskpoError):
    """Bad configuration or bad input: nothing was started, the user has to change something (exit code 2)."""

    exit_code = 2


class RunError(RiskpoError):
    """A run that could not go on (exit code 1)."""


def check_out_file(path: Path) -> None:
    """Raise UsageError where --out names a folder in place of a file in one, or lies below a file."""
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; name a file in it")
    check_out_folder(path.parent)


def check_out_folder(folder: Path) -> None:
    """Raise UsageError where --out cannot be, or lie in, the folder: a file is in its place."""
    for place in (folder, *folder.parents):
        if place.is_file():
            raise UsageError(f"--out: {place} is a file; name a folder")


def one_line(error: BaseException, limit: int | None = None) -> str:
    """What the error says, without line breaks, in `limit` characters at most."""
    return " ".join(str(error).split())[:limit]
