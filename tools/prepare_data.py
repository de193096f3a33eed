"""Questions of a downloaded data set in the form that `data.train` takes: JSON lines with problem and expected_answer.

    python tools/prepare_data.py IN OUT.jsonl --problem FIELD --answer FIELD

IN is a parquet file (needs pyarrow) or a file of JSON lines. A FIELD may lead inside: reward_model.ground_truth,
prompt.0.content. Rows without a problem or an answer are left out and counted.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import UsageError


def main() -> int:
    """Exit code 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--problem", required=True, metavar="FIELD")
    parser.add_argument("--answer", required=True, metavar="FIELD")
    parser.add_argument("--answer-after", metavar="MARK", help="the answer is what follows the last MARK (GSM8K: ####)")
    parser.add_argument("--answer-boxed", action="store_true", help="the answer is the last \\boxed{} (MATH)")
    parser.add_argument("--unique", action="store_true", help="each problem once")
    args = parser.parse_args()
    try:
        written, left_out = convert(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.target}: {written} questions; left out {left_out} without problem or answer, or seen before")
    return 0


def convert(args: argparse.Namespace) -> tuple[int, int]:
    """Questions written, and rows left out."""
    seen: set[str] = set()
    written = left_out = 0
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with args.target.open("w", encoding="utf-8") as out:
        for row in rows(args.source):
            problem, answer = field(row, args.problem), field(row, args.answer)
            answer = final_answer(str(answer or ""), args.answer_after, args.answer_boxed)
            if not problem or not answer or (args.unique and problem in seen):
                left_out += 1
                continue
            seen.add(str(problem))
            out.write(json.dumps({"problem": problem, "expected_answer": answer}, ensure_ascii=False) + "\n")
            written += 1
    if not written:
        raise UsageError(f"{args.source}: no row has {args.problem} and {args.answer}; look at its columns")
    return written, left_out


def rows(source: Path) -> Iterator[dict[str, Any]]:
    """Of a parquet or JSON-lines file."""
    if not source.is_file():
        raise UsageError(f"{source}: no such file")
    if source.suffix != ".parquet":
        with source.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
        return
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError(f"{source}: parquet files need pyarrow; pip install pyarrow") from None
    for batch in parquet.ParquetFile(source).iter_batches():
        yield from batch.to_pylist()


def field(row: Any, path: str) -> Any:
    """What `path` leads to, None where it leads nowhere."""
    for key in path.split("."):
        if isinstance(row, Mapping):
            row = row.get(key)
        elif isinstance(row, list) and key.isdigit() and int(key) < len(row):
            row = row[int(key)]
        else:
            return None
    return row


def final_answer(text: str, mark: str | None, boxed: bool) -> str:
    """The answer within a solution's text; empty where there is none."""
    if mark:
        text = text.rpartition(mark)[2] if mark in text else ""
    if boxed:
        text = last_boxed(text)
    return text.strip()


def last_boxed(text: str) -> str:
    """What is inside the last \\boxed{...}, its own braces included; empty without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place]
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
