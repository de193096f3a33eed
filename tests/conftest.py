"""Megatron-Core is imported by many tests, so the CPU backend has to be in place before any of them."""

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With parallel workers, which take whole files: first the files that take longest, or one of them would be begun
    last and go on alone."""
    if hasattr(config, "workerinput"):
        items.sort(key=_expected_share)


def _expected_share(item: pytest.Item) -> int:
    if item.get_closest_marker("slow"):
        return 0
    return 1 if hasattr(item.module, "run_on_ranks") else 2  # type: ignore[attr-defined]
