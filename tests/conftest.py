"""Megatron-Core is imported by many tests, so the CPU backend has to be in place before any of them."""

import gc
from pathlib import Path

import pytest

from megatron_riskpo.distributed import cpu_backend

cpu_backend.install()


@pytest.fixture
def toml(tmp_path: Path):
    """Writes a configuration file; returns its path."""

    def write(text: str = "") -> str:
        path = tmp_path / "x.toml"
        path.write_text(text)
        return str(path)

    return write


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # modules and thousands of items, which every full collection would walk again


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With parallel workers, which take whole files: first the files that take longest, or one of them would be begun
    last and go on alone."""
    if hasattr(config, "workerinput"):
        shares: dict[Path, int] = {}
        for item in items:
            shares[item.path] = min(_expected_share(item), shares.get(item.path, 2))
        items.sort(key=lambda item: shares[item.path])  # those of a file stay in their order


def _expected_share(item: pytest.Item) -> int:
    if item.get_closest_marker("slow"):
        return 0
    return 1 if hasattr(item.module, "run_on_ranks") else 2  # type: ignore[attr-defined]
