"""`riskpo convert`: its arguments, and what each kind does. Imports nothing heavy before it is needed."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import UsageError


def add_convert(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    text = "Convert checkpoints between Megatron's and Hugging Face's format, and check them (no ranks, no GPU)."
    kinds = commands.add_parser("convert", help=text, description=text).add_subparsers(
        dest="kind", required=True, metavar="KIND"
    )
    text = "A training checkpoint to a Hugging Face folder, one parameter in memory at a time."
    to_hf = kinds.add_parser("megatron-to-hf", help=text, description=text)
    to_hf.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="runs/NAME, or runs/NAME/checkpoints/step_N")
    to_hf.add_argument("target", metavar="OUT", help="the folder to write; must not exist")
    to_hf.add_argument("--step", type=int, metavar="N", help="of a run: this step instead of the newest whole one")
    to_hf.add_argument("--dtype", choices=("bfloat16", "float32"), help="round to it; as stored without")
    to_hf.add_argument("--model", metavar="DIR", help="model folder with config.json; without, the run's model.path")
    to_hf.add_argument("--tokenizer", metavar="DIR", help="tokenizer to carry along; without, the model folder's")
    text = "A Hugging Face folder to a torch_dist checkpoint of its weights, which Megatron loads under any layout."
    to_megatron = kinds.add_parser("hf-to-megatron", help=text, description=text)
    to_megatron.add_argument("source", metavar="HF_DIR", help="a Hugging Face model folder")
    to_megatron.add_argument("target", metavar="OUT", help="the folder to write; must not exist")
    to_megatron.add_argument("--dtype", choices=("bfloat16", "float32"), help="round to it; as stored without")
    text = "Compare a Hugging Face folder with its config.json, and bit for bit with another folder or a checkpoint."
    check = kinds.add_parser("check", help=text, description=f"{text} Exit code 1 if anything differs.")
    check.add_argument("folder", metavar="HF_DIR", help="a Hugging Face model folder")
    check.add_argument("other", metavar="OTHER", nargs="?", help="another one, a run, or a training checkpoint")


def run_convert(args: argparse.Namespace, arguments: list[str]) -> int:
    """One kind of `riskpo convert`; the exit code."""
    return {"megatron-to-hf": _megatron_to_hf, "hf-to-megatron": _hf_to_megatron, "check": _check}[args.kind](args)


def _megatron_to_hf(args: argparse.Namespace) -> int:
    import torch

    from megatron_riskpo.checkpoint.convert import checkpoint_weights, find_checkpoint, model_folder
    from megatron_riskpo.checkpoint.hf_folder import save_hf
    from megatron_riskpo.config_io import load_model_config
    from megatron_riskpo.data.tokenizer import carry_tokenizer, load_tokenizer

    target = _new_folder(args.target)
    checkpoint = find_checkpoint(Path(args.source), args.step)
    model_dir = Path(args.model) if args.model else model_folder(checkpoint)
    hf_config = load_model_config(model_dir, "--model")
    tokenizer_dir = args.tokenizer or model_dir
    # Before the weights: a missing one is said at once.
    tokenizer = load_tokenizer(tokenizer_dir, "--tokenizer")
    weights = checkpoint_weights(checkpoint, hf_config, getattr(torch, args.dtype) if args.dtype else None)

    def add_files(folder: Path) -> None:
        carry_tokenizer(tokenizer, tokenizer_dir, folder)
        generation = model_dir / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / generation.name)

    save_hf(target, weights, hf_config, add_files, is_writer=True)
    print(f"{checkpoint} -> {target}: {_describe(target)}")
    return 0


def _hf_to_megatron(args: argparse.Namespace) -> int:
    import torch

    from megatron_riskpo.checkpoint.check import check_folder
    from megatron_riskpo.checkpoint.from_hf import write_megatron

    source, target = Path(args.source), _new_folder(args.target)
    findings = check_folder(source)
    if findings:
        first = f"{findings[0].tensor} {findings[0].what}"
        raise UsageError(f"{source} is not what its config.json says, {len(findings)} differences, first: {first}; "
                         f"riskpo convert check {source} lists them")  # fmt: skip
    num_tensors = write_megatron(source, target, getattr(torch, args.dtype) if args.dtype else None)
    print(f"{source} -> {target}: {num_tensors} tensors")
    return 0


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
    return target


def _check(args: argparse.Namespace) -> int:
    from megatron_riskpo.checkpoint.check import check_folder, compare, report

    folder = Path(args.folder)
    findings = check_folder(folder)
    if args.other:
        findings += compare(folder, Path(args.other))
    if findings:
        print(report(findings))
        return 1
    compared = f", and every bit equal to {args.other}" if args.other else ""
    print(f"{folder}: {_describe(folder)}; names, shapes and dtypes as config.json asks for{compared}")
    return 0
