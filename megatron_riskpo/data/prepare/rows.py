"""The rows of published data files: Parquet, JSONL, or a JSON list; or of the Hugging Face hub."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_riskpo.errors import UsageError

Row = Mapping[str, Any]


def read_rows(files: Sequence[Path]) -> Iterator[tuple[str, Row]]:
    """(file:number, row) of all files in order. Raises UsageError that names what is wrong with which file."""
    for file in files:
        if not file.is_file():
            raise UsageError(f"--from {file}: no such file")
        readers = {".parquet": _parquet, ".jsonl": _jsonl, ".json": _json}
        reader = readers.get(file.suffix)
        if reader is None:
            raise UsageError(f"--from {file}: reads {', '.join(readers)} files; convert it")
        for number, row in enumerate(reader(file), 1):
            if not isinstance(row, Mapping):
                raise UsageError(f"{file}:{number} is no table of columns but {row!r:.60}")
            yield f"{file}:{number}", row


def hub_rows(repository: str, configs: Sequence[str | None], split: str) -> Iterator[tuple[str, Row]]:
    """The same out of the hub, through the package `datasets`. Raises UsageError where it or the network is missing."""
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError(
            f"without --from the data set {repository} is fetched through the package `datasets`, which is not "
            "installed; pip install datasets, or name local files with --from"
        ) from None
    try:
        parts = [datasets.load_dataset(repository, config, split=split) for config in configs]
    except Exception as error:  # whatever the hub's client raises
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{repository} could not be fetched ({reason}); name local files with --from") from error
    yield from ((f"{repository}:{number}", row) for number, row in enumerate(chain.from_iterable(parts), 1))


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError(f"{file}: Parquet files need the package pyarrow; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{file} is no readable Parquet file ({' '.join(str(error).split())[:120]})") from error


def _jsonl(file: Path) -> Iterator[Any]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            yield _json_value(line, f"{file}:{number}")


def _json(file: Path) -> Iterator[Any]:
    rows = _json_value(_text(file), str(file))
    if not isinstance(rows, list):
        raise UsageError(f"{file} holds no list of rows; a .json file must be one (.jsonl: an object a line)")
    yield from rows


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text (byte {error.start}); convert it") from error


def _json_value(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is no JSON ({error}): {text[:60]!r}") from error
