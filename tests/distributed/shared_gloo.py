"""One thread for the sockets of all gloo groups of a test's rank.

torch gives each group a thread of its own, which wakes up a hundred times a second also when nothing is sent. For the
twenty to fifty groups of a run that is nothing; ranks that go through dozens of layouts had 500 threads, and with them
took twice as long. Runs by the command line are tested as torch makes them.
"""

import functools
from datetime import timedelta

from torch.distributed import ProcessGroupGloo, Store, distributed_c10d


class SharedDeviceGloo(ProcessGroupGloo):
    """As torch makes it, but for its device, which is what gloo calls a thread and the address it listens at."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [_device()]
        super().__init__(store, rank, size, options)


@functools.cache
def _device() -> ProcessGroupGloo.Device:
    return ProcessGroupGloo.create_default_device()


def share_device() -> None:
    """For all groups that this process makes from now on; the thread does not come along into a fork."""
    distributed_c10d.ProcessGroupGloo = SharedDeviceGloo  # type: ignore[misc]
