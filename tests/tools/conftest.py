"""The scripts in tools/ and tools/benchmark/ import each other by file name, as they do when they are run."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = [str(TOOLS), str(TOOLS / "benchmark")]
    yield
    sys.path[:] = before


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Call a script's main with command-line arguments; the number of threads that it sets is set back."""
    num_threads = torch.get_num_threads()

    def run(script: ModuleType, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        script.main()

    yield run
    torch.set_num_threads(num_threads)
