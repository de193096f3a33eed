"""Python's garbage collector, kept from looking at what lives as long as the process.

torch, Megatron-Core and vLLM leave some million objects behind; a full collection walks all of them in 0.3 to 0.5 s.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """For a body that imports: no collection meanwhile (a fifth of the time that vLLM's import takes), nor of what the
    process has at its end ever after."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def without_collections() -> Iterator[None]:
    """gc.collect does nothing in the body, which asks for it more often than is of use."""
    collect = gc.collect
    gc.collect = lambda generation=2: 0  # type: ignore[assignment]
    try:
        yield
    finally:
        gc.collect = collect
