"""`riskpo serve`: its arguments, and what they start. Imports nothing heavy before it is needed."""

import argparse
from pathlib import Path
from typing import Any


def add_serve(commands: Any, overrides_help: str) -> None:
    """Add the command to argparse's subparsers."""
    text = "Serve a model with vLLM: OpenAI-style endpoints, and those by which a trainer sends weights."
    serve = commands.add_parser(
        "serve",
        help=text,
        description=f"{text} Whoever reaches the port may change the model: the server listens on this machine only, "
        "unless --host says otherwise.",
        epilog="SIGTERM and SIGINT (Ctrl-C) end it: exit code 0.",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=int, default=0, help="port to listen on (default: one that is free)")
    serve.add_argument(
        "--endpoint", type=Path, metavar="FILE",
        help="JSON file that gets url and pid once the server is healthy, and is deleted at its end "
        "(default with a configuration: server-HOST-PORT.json in the run folder)",
    )  # fmt: skip
    serve.add_argument("--tokens-only", action="store_true", help="load no tokenizer: token ids in and out")
    serve.add_argument(
        "--without-weights", action="store_true", help="start with arbitrary weights; a trainer sends some"
    )
    serve.add_argument("source", metavar="CONFIG_OR_MODEL", help="X.toml of a run, or a Hugging Face model folder")
    serve.add_argument("overrides", metavar="...", nargs=argparse.REMAINDER, help=overrides_help)


def run_serve(args: argparse.Namespace, arguments: list[str]) -> int:
    """Serve until a signal comes; the exit code."""
    from megatron_riskpo.config import TrainConfig
    from megatron_riskpo.config_checks import check_serve
    from megatron_riskpo.config_io import default_config, load_config, load_model_config
    from megatron_riskpo.distributed.launch import die_with_launcher

    die_with_launcher()
    folder = None
    if Path(args.source).is_dir():
        config = default_config(TrainConfig, ["--model.path", args.source, *args.overrides])
    else:
        config = load_config(TrainConfig, args.source, args.overrides)
        folder = Path(config.run.dir) / config.run.name
    check_serve(config, load_model_config(config.model.path))

    from megatron_riskpo.rollout.vllm_server import ServeOptions, serve

    options = ServeOptions(args.host, args.port, args.endpoint, folder, args.tokens_only, not args.without_weights)
    return serve(config, options)
