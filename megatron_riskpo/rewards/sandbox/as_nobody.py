"""Started by root, a sandbox runs as nobody: an escape would find an account without rights, and the kernel counts
processes only of accounts other than root.

Nobody may not read /root, where an interpreter may lie: this process gets a mount namespace of its own, in which the
needed paths are visible in a place that anyone may read. It goes with the process, all but an empty folder; what is
mounted elsewhere stays as it is, and what the system mounts later is seen here, too.
"""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

CLONE_NEWNS = 0x00020000  # linux/sched.h
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000  # linux/mount.h
NOBODY = 65534
PLACE = Path("/run/riskpo-sandbox")
"""Only root writes to /run."""


def visible_to_nobody(sources: Mapping[str, str]) -> dict[str, str]:
    """path inside -> path here, from sources like it. Once a process, by root. Raises OSError."""
    PLACE.mkdir(mode=0o755, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.unshare(CLONE_NEWNS), "unshare")
    _mount(libc, "none", "/", "", MS_REC | MS_SLAVE)
    _mount(libc, "tmpfs", str(PLACE), "tmpfs", 0, "mode=755,size=1m")
    seen = {}
    for number, (inside, here) in enumerate(sorted(sources.items())):
        target = PLACE / str(number)
        if os.path.isdir(here):
            target.mkdir(mode=0o755)
        else:
            target.touch(mode=0o644)
        _mount(libc, here, str(target), "", MS_BIND | MS_REC)
        seen[inside] = str(target)
    return seen


def _mount(libc: ctypes.CDLL, source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    texts = [text.encode() or None for text in (source, target, kind)]
    _checked(libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None), f"mount {target}")


def _checked(code: int, what: str) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
