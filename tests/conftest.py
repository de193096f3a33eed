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
