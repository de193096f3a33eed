"""`riskpo compare`: two evaluations of the same questions. Imports nothing heavy before it is needed."""

import argparse
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import UsageError, check_out_file


def add_compare(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    text = "Compare two evaluations of the same questions: paired intervals, sign test, difficulty bins, a page."
    command = commands.add_parser("compare", help=text, description=text)
    for name in ("a", "b"):
        command.add_argument(
            name, type=Path, metavar=name.upper(), help="a folder that riskpo evaluate or nemo-skills wrote, or a run"
        )
    command.add_argument("--out", type=Path, default=Path("comparison.html"), metavar="FILE.html",
                         help="where the page goes (comparison.html)")  # fmt: skip


def run_compare(args: argparse.Namespace, arguments: list[str]) -> int:
    """Print the tables, write the page; the exit code."""
    from megatron_riskpo.evaluation.comparison import compare, pairs
    from megatron_riskpo.evaluation.comparison_page import tables_of, write_page
    from megatron_riskpo.evaluation.outputs import evaluation_of
    from megatron_riskpo.evaluation.results import read_results

    if not args.out.resolve().parent.is_dir():
        raise UsageError(f"--out {args.out}: {args.out.resolve().parent} is no folder; make it first")
    check_out_file(args.out)
    found, left_out = pairs(read_results(evaluation_of(args.a)), read_results(evaluation_of(args.b)))
    comparisons = [compare(a, b) for a, b in found]
    print(f"A: {args.a}\nB: {args.b}")
    for comparison in comparisons:
        for table in tables_of(comparison):
            print(table.printed())
    if left_out:
        print(f"left out, since only one of them has it: {', '.join(left_out)}")
    print(f"page: {write_page(args.out, comparisons, str(args.a), str(args.b))}")
    return 0
