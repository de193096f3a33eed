"""The command that starts a sandbox: bubblewrap with every namespace of its own, and a file system that has an
interpreter and nothing else."""

import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

INTERPRETER = "/python"
HIDDEN = ("site-packages", "dist-packages")
WITHOUT = (
    "_tkinter",
    "_curses",
    "_ssl",
    "_dbm",
    "_gdbm",
    "_test",
    "readline",
    "nis",
    "ossaudiodev",
    "spwd",
    "xxlimited",
)


class Unavailable(Exception):
    """What is missing for a sandbox on this machine."""


@cache
def bwrap_path() -> str:
    """Raises Unavailable."""
    found = shutil.which("bwrap")
    if found is None:
        raise Unavailable("bubblewrap (bwrap) is not installed")
    return found


@cache
def needed_paths() -> tuple[str, ...]:
    """Files and folders that this interpreter needs: itself, its standard library, shared libraries with their loader.

    Raises Unavailable.
    """
    libraries = _libraries([_executable(), *map(str, _extensions())])
    return tuple(sorted({*_standard_library(), *libraries}))


def _standard_library() -> set[str]:
    """The base interpreter's, not those of a virtual environment, beside which lie its packages."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    return {sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")}


def _extensions() -> list[Path]:
    """Modules in shared libraries, but for those that reach out of the process: their libraries stay outside."""
    found = [path for folder in _standard_library() for path in Path(folder, "lib-dynload").glob("*.so")]
    return [path for path in found if not path.name.startswith(WITHOUT)]


@cache
def _executable() -> str:
    """The real interpreter behind a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable) or sys.executable)


def _libraries(binaries: list[str]) -> set[str]:
    """What the loader takes for the binaries, under the names that it looks for."""
    try:
        done = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"ldd, which tells the interpreter's libraries, does not run ({error})") from error
    words = [word for line in done.stdout.splitlines() if "=>" in line or line.strip().startswith("/")
             for word in line.split() if word.startswith("/") and not word.endswith(":")]  # fmt: skip
    return {word for word in words if os.path.exists(word)}


def command(source: str, sources_of: dict[str, str], filter_fd: int, tmp_bytes: int) -> list[str]:
    """Run Python text `source` as process 1 of a sandbox. `sources_of`: path inside -> path here, of needed_paths() and
    INTERPRETER. `filter_fd`: where bwrap reads the seccomp filter. The private /tmp holds `tmp_bytes`."""
    binds = [word for inside, here in sorted(sources_of.items()) for word in ("--ro-bind", here, inside)]
    packages = [str(Path(folder, name)) for folder in sorted(_standard_library()) for name in HIDDEN]
    hidden = [word for folder in packages if Path(folder).is_dir() for word in ("--tmpfs", folder)]
    read_only = [word for name in (*hidden[1::2], "/dev", "/") for word in ("--remount-ro", name)]
    return [
        bwrap_path(), "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
        "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL",
        "--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--clearenv",
        *binds, *hidden, "--dev", "/dev", "--size", str(tmp_bytes), "--tmpfs", "/tmp", *read_only,
        "--chdir", "/tmp", "--seccomp", str(filter_fd),
        "--setenv", "PYTHONHOME", f"{sys.base_prefix}:{sys.base_exec_prefix}", "--setenv", "PYTHONHASHSEED", "0",
        INTERPRETER, "-s", "-S", "-B", "-X", "utf8", "-c", source,
    ]  # fmt: skip


def sources() -> dict[str, str]:
    """path inside -> path here, for an account that may read the paths. Raises Unavailable."""
    return {**{path: path for path in needed_paths()}, INTERPRETER: _executable()}
