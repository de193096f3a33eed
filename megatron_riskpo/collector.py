"""Python's garbage collector, kept from looking at what lives as long as the process.

torch, Megatron-Core and vLLM leave some million objects behind; a full collection walks all of them in 0.3 to 0.5 s.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """For a body that imports: nothing is collected meanwhile (a fifth of the time that vLLM's import takes), and what
    there is at its end, garbage too, is set aside until gc.unfreeze. vLLM calls that when an engine is closed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def without_requested_collections() -> Iterator[None]:
    """gc.collect does nothing in the body, which asks for it more often than is of use; Python's own collections go on.
    For the main thread."""
    collect = gc.collect
    gc.collect = lambda generation=2: 0  # type: ignore[assignment]
    try:
        yield
    finally:
        gc.collect = collect
