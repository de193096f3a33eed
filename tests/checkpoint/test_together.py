"""The system's error is found however a library has wrapped it, and ascribed to the rank where it arose."""

import errno

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from megatron_riskpo.checkpoint.together import GroupFailureError, describe_failure

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "rank"),
    [
        (NO_SPACE, 5),
        (caused(RuntimeError("writer failed"), NO_SPACE), 5),
        (CheckpointException("write", {3: _wrap_exception(NO_SPACE)}), 3),
        (CheckpointException("write", {3: _wrap_exception(caused(ValueError("x"), NO_SPACE))}), 3),
    ],
    ids=["plain", "context", "torch", "torch with context"],
)
def test_system_error_is_found(error, rank):
    failure = describe_failure(error, 5)
    assert (failure.rank, failure.reason, failure.is_io) == (rank, "No space left on device", True)


def test_other_errors_are_named_in_one_line():
    failure = describe_failure(KeyError("weight\nsecond line"), 1)
    assert failure.reason.startswith("KeyError: ")
    assert "\n" not in failure.reason
    assert not failure.is_io


def test_a_refused_write_is_named_before_what_followed_from_it():
    followed, refused = describe_failure(ValueError("no files"), 0), describe_failure(NO_SPACE, 1)
    assert GroupFailureError([followed, refused]).first == refused
