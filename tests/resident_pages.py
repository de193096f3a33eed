"""Memory that is certainly new, and certainly given back: pages from the system, not from an allocator that keeps
what earlier tests have freed."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resident(num_bytes: int) -> Iterator[None]:
    """The process holds so many more bytes, each page touched, in the body."""
    with mmap.mmap(-1, num_bytes) as pages:
        for start in range(0, num_bytes, mmap.PAGESIZE):
            pages[start] = 1
        yield
