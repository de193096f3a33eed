"""`riskpo convert`: its arguments, and what each kind does. Imports nothing heavy before it is needed."""

import argparse
import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_riskpo.checkpoint.manifest import partial_of
from megatron_riskpo.distributed.job import report_done
from megatron_riskpo.distributed.launch import die_with_launcher, launch, process_env
from megatron_riskpo.errors import RunError, UsageError

if TYPE_CHECKING:
    from megatron_riskpo.checkpoint.team import Team

_DTYPES = ("bfloat16", "float32")


def add_convert(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    text = "Convert checkpoints between Megatron's and Hugging Face's format, and check them (no GPU)."
    kinds = commands.add_parser("convert", help=text, description=text).add_subparsers(
        dest="kind", required=True, metavar="KIND"
    )
    _add_to_hf(kinds)
    _add_to_megatron(kinds)
    _add_check(kinds)


def _add_kind(kinds: Any, name: str, text: str, rest: str = "") -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=text, description=f"{text}{rest}")
    parser.add_argument("--ranks", type=_positive, metavar="N", default=1,
                        help="processes that share the work; under torchrun or srun all of theirs do")  # fmt: skip
    return parser


def _add_to_hf(kinds: Any) -> None:
    parser = _add_kind(kinds, "megatron-to-hf", "A training checkpoint to a Hugging Face folder.")
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="runs/NAME, or runs/NAME/checkpoints/step_N")
    parser.add_argument("target", metavar="OUT", help="the folder to write; must not exist")
    parser.add_argument("--step", type=int, metavar="N", help="of a run: this step instead of the newest whole one")
    parser.add_argument("--dtype", choices=_DTYPES, help="round to it; as stored without")
    parser.add_argument("--model", metavar="DIR", help="model folder with config.json; without, the run's model.path")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer to carry along; without, the model folder's")


def _add_to_megatron(kinds: Any) -> None:
    text = "A Hugging Face folder to a torch_dist checkpoint of its weights, which Megatron loads under any layout."
    parser = _add_kind(kinds, "hf-to-megatron", text)
    parser.add_argument("source", metavar="HF_DIR", help="a Hugging Face model folder")
    parser.add_argument("target", metavar="OUT", help="the folder to write; must not exist")
    parser.add_argument("--dtype", choices=_DTYPES, help="round to it; as stored without")


def _add_check(kinds: Any) -> None:
    text = "Compare a Hugging Face folder with its config.json, and bit for bit with another folder or a checkpoint."
    parser = _add_kind(kinds, "check", text, " Exit code 1 if anything differs.")
    parser.add_argument("folder", metavar="HF_DIR", help="a Hugging Face model folder")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="another one, a run, or a training checkpoint")
    parser.add_argument("--prompts", metavar="FILE", type=Path,
                        help="also compare log-probs of these texts: Megatron's from OTHER (or HF_DIR), transformers' "
                        "from HF_DIR; one a line, or JSONL with the key prompt")  # fmt: skip
    parser.add_argument("--tolerance", type=_difference, metavar="NATS", default=1e-4,
                        help="largest difference of a log-prob, in float32 (default 1e-4)")  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def _difference(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or above, not {text!r}")
    return value


def run_convert(args: argparse.Namespace, arguments: list[str]) -> int:
    """One kind of `riskpo convert`; the exit code."""
    die_with_launcher()
    env = process_env()
    if env is None and args.ranks > 1:
        return _launch(args, arguments)
    if env is not None and args.ranks not in (1, env.world_size):
        raise UsageError(f"--ranks {args.ranks}, but {env.world_size} have been started; leave --ranks out")
    from megatron_riskpo.checkpoint.team import gathered

    kinds = {"megatron-to-hf": _megatron_to_hf, "hf-to-megatron": _hf_to_megatron, "check": _check}
    # As at Ctrl-C, half a folder is removed.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with gathered(env) as team:
            code = kinds[args.kind](args, team)
            if team.rank == 0:
                report_done()
            return code
    finally:
        signal.signal(signal.SIGTERM, before)


def _launch(args: argparse.Namespace, arguments: list[str]) -> int:
    code = launch([sys.executable, "-m", "megatron_riskpo.cli", *arguments], args.ranks)
    if code and args.kind != "check":
        # The rank that would remove it may be the one that was killed.
        shutil.rmtree(partial_of(Path(args.target)), ignore_errors=True)
    return code


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _megatron_to_hf(args: argparse.Namespace, team: "Team") -> int:
    from megatron_riskpo.checkpoint.check import expected_shapes
    from megatron_riskpo.checkpoint.convert import write_hf
    from megatron_riskpo.checkpoint.source import find_checkpoint, model_folder
    from megatron_riskpo.checkpoint.to_hf import MegatronWeights
    from megatron_riskpo.config_io import load_model_config

    target = team.first(lambda: _new_folder(args.target))
    checkpoint = find_checkpoint(Path(args.source), args.step, team)
    model_dir = team.first(lambda: Path(args.model) if args.model else model_folder(checkpoint))
    hf_config = team.first(lambda: load_model_config(model_dir, "--model"))
    # Only for what is wrong in it.
    team.first(lambda: expected_shapes(hf_config))
    tokenizer_dir = Path(args.tokenizer) if args.tokenizer else model_dir
    # Before the weights: a missing one is said at once.
    carry_tokenizer = team.each(lambda: _tokenizer_carrier(tokenizer_dir) if team.rank == 0 else None)
    weights = team.each(lambda: MegatronWeights(checkpoint, hf_config))

    def add_files(folder: Path) -> None:
        assert carry_tokenizer is not None
        carry_tokenizer(folder)
        generation = model_dir / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)

    write_hf(team, weights, hf_config, target, _dtype(args), add_files)
    if team.rank == 0:
        print(f"{checkpoint} -> {target}: {_describe(target)}")
    return 0


def _tokenizer_carrier(source: Path) -> Callable[[Path], None]:
    """What puts the tokenizer of a folder, or of a .model file, into another folder."""
    from megatron_riskpo.checkpoint.hf_folder import side_files

    if (source / "tokenizer.json").is_file():
        files = [file for file in side_files(source) if file.name not in ("config.json", "generation_config.json")]
        return lambda folder: _copy_files(files, folder)
    # transformers takes seconds to import: only where a SentencePiece model has to be converted.
    from megatron_riskpo.data.tokenizer import carry_tokenizer, load_tokenizer

    tokenizer = load_tokenizer(source, "--tokenizer")
    return lambda folder: carry_tokenizer(tokenizer, source, folder)


def _copy_files(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _hf_to_megatron(args: argparse.Namespace, team: "Team") -> int:
    from megatron_riskpo.checkpoint.check import check_folder
    from megatron_riskpo.checkpoint.convert import write_megatron
    from megatron_riskpo.checkpoint.hf_folder import HfReader, side_files
    from megatron_riskpo.checkpoint.source import CARRIED
    from megatron_riskpo.config_io import load_model_config

    source, target = Path(args.source), team.first(lambda: _new_folder(args.target))
    hf_config = team.first(lambda: load_model_config(source, "HF_DIR"))
    findings = team.first(lambda: check_folder(source))
    if findings:
        first = f"{findings[0].tensor} {findings[0].what}"
        raise UsageError(f"{source} is not what its config.json says, {len(findings)} differences, first: {first}; "
                         f"riskpo convert check {source} lists them")  # fmt: skip
    write_megatron(
        team, source, hf_config, target, _dtype(args), lambda folder: _copy_files(side_files(source), folder / CARRIED)
    )
    if team.rank == 0:
        print(f"{source} -> {target}: {len(HfReader(source).names)} tensors")
    return 0


def _dtype(args: argparse.Namespace) -> Any:
    import torch

    return getattr(torch, args.dtype) if args.dtype else None


def _describe(folder: Path) -> str:
    from megatron_riskpo.checkpoint.hf_folder import HfReader

    reader = HfReader(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtypes = sorted({reader.dtype(name) for name in reader.names})
    return f"{len(reader.names)} tensors, {size / 2**20:.1f} MiB, {', '.join(dtypes)}"


def _new_folder(path: str) -> Path:
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"OUT = {path} is there already; name a folder that is not")
    return target.absolute()


def _check(args: argparse.Namespace, team: "Team") -> int:
    from megatron_riskpo.checkpoint.check import check_folder, compare, report

    if args.prompts and team.size > 1:
        raise UsageError(f"--prompts is for one process, {team.size} have been started; leave --ranks out")
    prompts = _prompts(args)
    folder = Path(args.folder)
    findings = team.first(lambda: check_folder(folder))
    if args.other:
        findings += compare(team, folder, Path(args.other))
    if team.rank > 0:
        return 0
    if findings:
        print(report(findings), flush=True)
    else:
        compared = f", and every bit equal to {args.other}" if args.other else ""
        print(f"{folder}: {_describe(folder)}; names, shapes and dtypes as config.json asks for{compared}", flush=True)
    if prompts:
        # Whatever the bits: rounded weights differ in all of them.
        _check_logprobs(folder, Path(args.other) if args.other else folder, prompts, args.tolerance)
    if findings:
        raise RunError(f"{folder} is not as it should be; the table above says where")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    # Before the checksums, which may take minutes.
    if not args.prompts:
        return []
    from megatron_riskpo.checkpoint.logprob_check import read_prompts

    return read_prompts(args.prompts)


def _check_logprobs(folder: Path, source: Path, prompts: list[str], tolerance: float) -> None:
    from megatron_riskpo.checkpoint.logprob_check import compare_logprobs

    found = compare_logprobs(folder, source, prompts)
    text = (f"log-probs of {found.num_tokens} tokens in {len(prompts)} prompts, Megatron with {source} against "
            f"transformers with {folder}: mean difference {found.mean:.2g}, largest {found.largest:.2g}")  # fmt: skip
    # So that a NaN counts as different.
    if not found.largest <= tolerance:
        raise RunError(f"{text}; more than --tolerance {tolerance:g}")
    print(text)
