"""Which system calls a sandboxed program may make: two filters, assembled by libseccomp for this machine.

The first holds for the whole sandbox from its start. It is a list of what an interpreter needs; anything else (sockets,
mounts, namespaces, ptrace, keys, bpf, io_uring, memory of other processes ...) answers "not implemented". The second is
put on each test's process before it runs a line of the program: no new process, no other program, threads only.
"""

import ctypes
import ctypes.util
import errno
import os
from collections.abc import Iterable
from functools import cache

# linux/seccomp.h and libseccomp's seccomp.h
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
EQUAL, MASKED_EQUAL, NOT_EQUAL = 4, 7, 1
CLONE_THREAD = 0x00010000
# linux/sched.h: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME
CLONE_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x80

INTERPRETER_CALLS = """
    read write readv writev pread64 pwrite64 open openat close close_range creat stat fstat lstat newfstatat statx
    statfs fstatfs lseek access faccessat faccessat2 readlink readlinkat getdents64 getcwd chdir fchdir mkdir
    mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat chmod fchmod fchmodat
    utimensat umask truncate ftruncate fallocate fsync fdatasync flock fcntl ioctl dup dup2 dup3 pipe pipe2 poll
    ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 socketpair memfd_create sendto
    recvfrom sendmsg recvmsg shutdown mmap munmap mprotect mremap brk madvise mincore msync rt_sigaction
    rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause alarm setitimer
    getitimer timer_create timer_settime timer_delete nanosleep clock_nanosleep clock_gettime clock_getres
    gettimeofday time times getrusage getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid
    getresgid getpgrp getpgid getsid setsid setpgid kill tgkill futex set_robust_list get_robust_list
    set_tid_address rseq membarrier sched_yield sched_getaffinity getpriority arch_prctl prctl prlimit64 getrlimit
    setrlimit uname sysinfo getrandom getcpu execve fork vfork wait4 waitid exit exit_group restart_syscall
    pidfd_open pidfd_send_signal
"""
NO_MORE_PROCESSES = """
    execve execveat fork vfork memfd_create pidfd_open pidfd_send_signal prctl setrlimit
"""


class SeccompMissing(Exception):
    """libseccomp is not installed, or cannot make the filters."""


class _Compare(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


@cache
def sandbox_filter() -> bytes:
    """The first filter, as the kernel takes it (array of struct sock_filter). Raises SeccompMissing."""
    with _Filter(default=ERRNO | errno.ENOSYS) as made:
        made.rule(ALLOW, INTERPRETER_CALLS.split())
        # clone3's flags are behind a pointer: libc falls back to clone, whose flags can be seen.
        made.rule(ALLOW, ["clone"], _Compare(0, MASKED_EQUAL, CLONE_NAMESPACES, 0))
        return made.program()


@cache
def program_filter() -> bytes:
    """The second filter. Raises SeccompMissing."""
    with _Filter(default=ALLOW) as made:
        made.rule(ERRNO | errno.EPERM, NO_MORE_PROCESSES.split())
        made.rule(ERRNO | errno.EPERM, ["clone"], _Compare(0, MASKED_EQUAL, CLONE_THREAD, 0))
        # The limits of the supervisor are not the program's to set.
        made.rule(ERRNO | errno.EPERM, ["prlimit64"], _Compare(0, NOT_EQUAL, 0, 0))
        return made.program()


class _Filter:
    """A filter in the making."""

    def __init__(self, default: int) -> None:
        self._library = _library()
        self._context = self._library.seccomp_init(default)
        if not self._context:
            raise SeccompMissing("libseccomp cannot make a filter on this machine")

    def __enter__(self) -> "_Filter":
        return self

    def __exit__(self, *_: object) -> None:
        self._library.seccomp_release(self._context)

    def rule(self, action: int, calls: Iterable[str], *compare: _Compare) -> None:
        """For the calls that this machine has (an aarch64 kernel has no fork)."""
        for name in calls:
            number = self._library.seccomp_syscall_resolve_name(name.encode())
            arguments = (_Compare * len(compare))(*compare)
            code = self._library.seccomp_rule_add_array(self._context, action, number, len(compare), arguments)
            # Negative numbers are of other machines: EDOM, or the rule is dropped.
            if code and number >= 0:
                raise SeccompMissing(f"libseccomp refuses a rule for {name}: {os.strerror(-code)}")

    def program(self) -> bytes:
        file = os.memfd_create("filter")
        try:
            code = self._library.seccomp_export_bpf(self._context, file)
            if code:
                raise SeccompMissing(f"libseccomp cannot write a filter: {os.strerror(-code)}")
            return os.pread(file, os.fstat(file).st_size, 0)
        finally:
            os.close(file)


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise SeccompMissing("libseccomp.so.2 is not installed") from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare),
    ]  # fmt: skip
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library
