"""Functions of the user's own, named in the configuration."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import UsageError


@cache
def load_function(option: str, name: str) -> Callable[..., Any]:
    """The function that `name` = FILE.py:function or module:function stands for. `option` is for the error.

    The file is the user's own code and is run as such. Raises UsageError where it cannot be loaded.
    """
    source, _, function = name.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(source)
    # Whatever the user's code raises while it is loaded.
    except Exception as error:
        raise UsageError(f"{option} = {name}: {source} cannot be loaded ({type(error).__name__}: {error})") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UsageError(f"{option} = {name}: {source} has no function {function!r}")
    return found
