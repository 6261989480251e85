"""Tables of named columns, read row by row: .tsv, .csv, .jsonl and .parquet files, and hub datasets."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

from modelzip.checkpoints.errors import CalibrationError

KINDS: Final = ".tsv, .csv, .jsonl or .parquet"


@dataclass(frozen=True)
class Table:
    """columns: names in the order of the source. rows: where each row stands (for messages), and its values.

    classes: for integer columns whose source says so, the class names in the order of their ids.
    """

    columns: tuple[str, ...]
    rows: Iterator[tuple[str, Mapping[str, Any]]]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_table(source: str, *, split: str) -> Table:
    """Open a file by its ending, anything else as a hub dataset, NAME or NAME:CONFIG; `split` is for those alone.

    Raises CalibrationError for what is missing, empty, of another kind or broken; some only once the rows are read.
    """
    path = Path(source)
    if (reader := _READERS.get(path.suffix)) is None and not path.exists():
        return _hub(source, split)
    if not path.is_file():
        raise CalibrationError(f"There is no file {source}: check the path of the labelled examples.")
    if reader is None:
        raise CalibrationError(f"{source} is of no known kind: labelled examples come from {KINDS} files.")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{source} is empty: give a file with labelled examples.")
    return reader(path)


def _tsv(path: Path) -> Table:
    """Tab-separated as GLUE has it: a quote is a character like any other, and every line is a row."""
    return _with_header(path, _tab_separated(path))


def _csv(path: Path) -> Table:
    return _with_header(path, _comma_separated(path))


def _tab_separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(_decoded(path, stream), 1):
            yield number, line.rstrip("\r\n").split("\t")


def _comma_separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(_decoded(path, stream), strict=True)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise CalibrationError(f"{path} line {reader.line_num} isn't CSV: {error}.") from None
            if row is None:
                return
            yield reader.line_num, row


def _with_header(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Table:
    columns = tuple(next(lines)[1])
    if len(set(columns)) < len(columns):
        raise CalibrationError(
            f"{path} has no header row, or names a column twice: its first line must name each column, and it is "
            f"{', '.join(columns)}."
        )

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, values in lines:
            if not any(values):
                continue
            if len(values) != len(columns):
                raise CalibrationError(
                    f"{path} line {number} has {len(values)} columns, but its first line names {len(columns)}: "
                    f"{', '.join(columns)}."
                )
            yield f"{path} line {number}", dict(zip(columns, values, strict=True))

    return Table(columns, rows())


def _decoded(path: Path, lines: Iterator[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} isn't UTF-8 text: {error.reason}; convert it, or give another file.") from None


def _jsonl(path: Path) -> Table:
    rows = _objects(path)
    first = next(rows, None)
    if first is None:
        raise CalibrationError(f"{path} is empty: give a file with labelled examples.")
    return Table(tuple(first[1]), chain([first], rows))


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(_decoded(path, stream), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{path} line {number} isn't JSON: {error.msg}.") from None
            if not isinstance(row, dict):
                raise CalibrationError(f"{path} line {number} holds {type(row).__name__}, not an object with fields.")
            yield f"{path} line {number}", row


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise CalibrationError(f"{path} isn't a parquet file: {str(error).rstrip('.')}.") from None
    stated = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    features = stated.get("info", {}).get("features", {})
    classes = {name: tuple(one["names"]) for name, one in features.items() if one.get("_type") == "ClassLabel"}

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row

    return Table(tuple(file.schema_arrow.names), rows(), classes)


def _hub(source: str, split: str) -> Table:
    import datasets

    name, _, config = source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split, streaming=True)
        found = iter(data)
        first = next(found, None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CalibrationError(
            f"{source} is no local file, and the hub dataset can't be opened: {told.rstrip('.')}; "
            f"give a {KINDS} file with labelled examples."
        ) from None
    if first is None:
        raise CalibrationError(f"The split {split} of {source} is empty.")
    features = data.features or {}
    classes = {key: tuple(one.names) for key, one in features.items() if isinstance(one, datasets.ClassLabel)}
    rows = ((f"{source} ({split}) row {number}", row) for number, row in enumerate(chain([first], found), 1))
    return Table(tuple(first), rows, classes)


_READERS: Final[Mapping[str, Callable[[Path], Table]]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
