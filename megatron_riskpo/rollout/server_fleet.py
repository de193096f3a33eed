"""Rank 0's part of a run on servers: the processes it started, who may get weights, and the folder they go through."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from megatron_riskpo.config_waits import restart_limit_s
from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.server_process import ServerProcess

_MEMORY = Path("/dev/shm")
_PREFIX = "riskpo-transfer-"
_POLL_S = 0.1


class ServerFleet:
    """The servers of the run by address: started by it, or given."""

    def __init__(self, processes: Sequence[ServerProcess], given: Sequence[str], log: Callable[[str], None]) -> None:
        self._log = log
        self._given = list(given)
        self._urls: dict[ServerProcess, str | None] = dict.fromkeys(processes)
        """Where each process that has not failed was last; None: starting."""
        self._up_at: dict[ServerProcess, float] = {}
        """Since when (time.monotonic)."""
        self._gone: list[str] = []
        """Why those that are no longer there are not."""
        for process in processes:
            process.start()

    @property
    def has_processes(self) -> bool:
        """Whether a server of the run's own is up, or starting."""
        return bool(self._urls)

    @property
    def processes(self) -> dict[str, ServerProcess]:
        """The run's own servers that are up, by address."""
        return {url: process for process, url in self._urls.items() if url is not None}

    def restart(self, failed: Sequence[str]) -> None:
        """Start the processes at these addresses again, if they may be; does not wait for them."""
        for process, url in list(self._urls.items()):
            if url is not None and url in failed:
                self._restart(process, f"the server at {url} failed")

    def restart_unready(self, ready: Collection[str], given_up: Collection[str]) -> None:
        """`ready`: the servers that can take weights. Of the others those are started again that the run has given up,
        also while nobody asked them for anything, and those that have had server.health_timeout_s since they came up;
        does not wait for them."""
        for process, url in list(self._urls.items()):
            if url is None or url in ready:
                continue
            late_s = time.monotonic() - self._up_at[process]
            if url in given_up or late_s > process.config.server.health_timeout_s:
                self._give_up(process, f"{url} cannot take weights")

    def addresses(self) -> list[str]:
        """Of the servers that are up. Waits until one is. Raises RunError where none can be any more, or is not by when
        the other ranks would give up."""
        begun = time.monotonic()
        while True:
            for process, url in list(self._urls.items()):
                if url is None:
                    self._look(process)
                elif process.has_ended:
                    self._give_up(process, f"{url} ended")
            found = [*self._given, *(url for url in self._urls.values() if url is not None)]
            if found:
                return found
            if not self.has_processes:
                raise RunError(f"no rollout server is left: {'; '.join(self._gone)}")
            limit_s = restart_limit_s(next(iter(self._urls)).config)
            if time.monotonic() - begun > limit_s:
                raise RunError(
                    f"no rollout server came back within {limit_s:g} s, for which the other ranks wait; raise "
                    "run.timeout_s"
                )
            time.sleep(_POLL_S)

    def wait_for_all(self) -> None:
        """Until each process is healthy. Raises RunError where one does not start: at the beginning of a run that is a
        mistake in its set-up."""
        for process in self._urls:
            self._come_up(process, process.wait())

    def close(self) -> None:
        """End the processes."""
        for process in self._urls:
            process.stop()
        self._urls = {}

    def _come_up(self, process: ServerProcess, url: str | None) -> None:
        self._urls[process], self._up_at[process] = url, time.monotonic()

    def _look(self, process: ServerProcess) -> None:
        try:
            self._come_up(process, process.url())
        except RunError as error:
            self._log(str(error))
            self._restart(process, str(error))

    def _give_up(self, process: ServerProcess, reason: str) -> None:
        self._log(f"rollout server given up: {reason}")
        self._restart(process, reason)

    def _restart(self, process: ServerProcess, reason: str) -> None:
        if process.restart():
            self._urls[process] = None
            self._log(f"rollout server {process.index} is started again ({process.restarts_left} more times at most)")
            return
        process.stop()
        del self._urls[process]
        self._gone.append(f"{reason}, and server.max_restarts = {process.config.server.max_restarts} is used up")


@contextlib.contextmanager
def transfer_folder(parent: str) -> Iterator[Path]:
    """A folder of this process below `parent` (empty: in memory), deleted at the end; in memory also what killed runs
    left."""
    if parent:
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    root = _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
    _remove_left_over(root)
    folder, lock = _locked_folder(root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(root: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor by which it is locked as long as this process lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)
        # Another run took it, before it was locked, for one that was left.


def _remove_left_over(root: Path) -> None:
    """Folders that nobody locks. Locks are the kernel's, and hold across containers; process ids do not."""
    for folder in root.glob(f"{_PREFIX}*"):
        # Gone, or another user's; locked.
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
