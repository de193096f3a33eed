"""Rank 0's part of a run on servers: the processes it started, who may get weights, and the folder they go through."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_riskpo.errors import RunError
from megatron_riskpo.rollout.server_process import ServerProcess

_MEMORY = Path("/dev/shm")
_PREFIX = "riskpo-weights-"
_POLL_S = 0.1


class ServerFleet:
    """The servers of the run by address: started by it, or given."""

    def __init__(self, processes: Sequence[ServerProcess], given: Sequence[str], log: Callable[[str], None]) -> None:
        self._log = log
        self._given = list(given)
        self._urls: dict[ServerProcess, str | None] = dict.fromkeys(processes)
        """Where each process that has not failed was last; None: starting."""
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

    def addresses(self) -> list[str]:
        """Of the servers that are up. Waits until one is. Raises RunError where none can be any more."""
        while True:
            for process, url in list(self._urls.items()):
                if url is None:
                    self._look(process)
            found = [*self._given, *(url for url in self._urls.values() if url is not None)]
            if found:
                return found
            if not self.has_processes:
                raise RunError(f"no rollout server is left: {'; '.join(self._gone)}")
            time.sleep(_POLL_S)

    def wait_for_all(self) -> None:
        """Until each process is healthy. Raises RunError where one does not start: at the beginning of a run that is a
        mistake in its set-up."""
        for process in self._urls:
            self._urls[process] = process.wait()

    def close(self) -> None:
        """End the processes."""
        for process in self._urls:
            process.stop()
        self._urls = {}

    def _look(self, process: ServerProcess) -> None:
        try:
            self._urls[process] = process.url()
        except RunError as error:
            self._restart(process, str(error))

    def _restart(self, process: ServerProcess, reason: str) -> None:
        if process.restart():
            self._urls[process] = None
            self._log(f"rollout server {process.index} is started again ({process.restarts_left} more times at most)")
            return
        process.stop()
        del self._urls[process]
        self._gone.append(f"{reason}, and server.max_restarts = {process.config.server.max_restarts} is used up")


@contextlib.contextmanager
def transfer_folder(parent: str):
    """A folder of this process below `parent` (empty: in memory), deleted at the end; also what killed runs left."""
    root = Path(parent) if parent else _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
    if not parent:
        _remove_left_over(root)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_over(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
