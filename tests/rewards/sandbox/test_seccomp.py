"""The filters' lists of system calls. What the filters keep out is in test_escapes.py."""

import platform

import pytest

from megatron_riskpo.rewards.sandbox import seccomp


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have fewer of these calls")
@pytest.mark.parametrize("calls", [seccomp.INTERPRETER_CALLS, seccomp.NO_MORE_PROCESSES])
def test_every_name_is_a_call(calls: str):
    resolve = seccomp._library().seccomp_syscall_resolve_name
    assert [name for name in calls.split() if resolve(name.encode()) < 0] == []


def test_filters_are_arrays_of_the_kernels_instructions():
    for program in (seccomp.sandbox_filter(), seccomp.program_filter()):
        assert len(program) % 8 == 0
        assert 0 < len(program) < 32_768
