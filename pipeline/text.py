"""Text from files and data sets, cut into windows of tokens. Nothing is dropped without being said."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CalibrationError

from .called import CALIBRATION, Called

CHARACTERS_PER_TOKEN = 6
"""Text tokenized at first for each token wanted; if that is too little, twice as much, and so on."""

MARGIN = 64
"""Tokens at the end of a text that was cut off which are not used: they might differ in the whole text."""


@dataclass(frozen=True)
class Windows:
    """tokens: int64 [windows, seq_len]. sha256: of the tokens."""

    tokens: Tensor
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def split(self, count: int, *, rest: str) -> tuple[Windows, Windows | None]:
        """The first `count` windows, and those after them under the name `rest`, None if there are none."""
        after = self.tokens[count:]
        return Windows(self.tokens[:count], self.source), Windows(after, rest) if len(after) else None


def read_windows(
    source: str,
    tokenizer: Any,
    *,
    field: str,
    split: str,
    count: int,
    seq_len: int,
    least: int | None = None,
    called: Called = CALIBRATION,
) -> Windows:
    """The first `count` windows of `seq_len` tokens of a file or hub dataset.

    The documents are joined by blank lines and tokenized in one go, no special tokens added, and cut without overlap.
    With `least`, fewer windows down to that number will do. called: how those who can mend it know the settings.
    Raises CalibrationError if the source holds too little.
    """
    needed = count * seq_len
    characters = needed * CHARACTERS_PER_TOKEN
    while True:
        text, is_whole = _text(source, field=field, split=split, characters=characters, called=called)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        if is_whole or len(ids) >= needed + MARGIN:
            break
        characters *= 2
    if not text.strip():
        raise CalibrationError(f"{source} holds no text: give a file with at least {needed} tokens.")
    found = len(ids) // seq_len
    if found < (count if least is None else least):
        raise CalibrationError(
            f"{source} holds {len(ids)} tokens, enough for {found} windows of {seq_len}; "
            f"{count if least is None else least} were asked for: give more text, or lower {called.length}."
        )
    taken = min(found, count)
    return Windows(ids[: taken * seq_len].reshape(taken, seq_len), source)


def check_source(source: str, *, field: str, called: Called = CALIBRATION) -> None:
    """Raise CalibrationError if a local file is missing, empty, of an unknown kind, or lacks the field."""
    if not is_file(source):
        return
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(f"There is no file {source}: check the path of the calibration or evaluation text.")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{source} is empty: give a file with text.")
    next(documents(path, field, called=called), None)


def is_file(source: str) -> bool:
    """Whether a source names a local file, which may be missing, and not a hub dataset."""
    path = Path(source)
    return path.exists() or path.suffix in {".txt", ".jsonl", ".parquet", ".json", ".csv", ".tsv", ".md"}


def _text(source: str, *, field: str, split: str, characters: int, called: Called) -> tuple[str, bool]:
    """About the first `characters` of the source's text, and whether that is all of it."""
    every = (
        documents(Path(source), field, called=called)
        if is_file(source)
        else _hub(source, field=field, split=split, called=called)
    )
    pieces: list[str] = []
    length = 0
    for document in every:
        pieces.append(document)
        length += len(document) + 2
        if length > characters:
            break
    else:
        return "\n\n".join(pieces), True
    text = "\n\n".join(pieces)
    end = text.rfind("\n", 0, characters)
    return text[: end if end > 0 else characters], False


def documents(path: Path, field: str, *, called: Called = CALIBRATION) -> Iterator[str]:
    """The texts of a local file. Raises CalibrationError."""
    if path.suffix == ".parquet":
        yield from _parquet(path, field, called)
    elif path.suffix == ".jsonl":
        yield from _jsonl(path, field, called)
    elif path.suffix == ".txt":
        with path.open(encoding="utf-8", newline="") as stream:
            try:
                yield stream.read()
            except UnicodeDecodeError as error:
                raise _not_text(path, error) from None
    elif path.suffix in (".csv", ".tsv"):
        yield from _table(path, field, called)
    else:
        raise CalibrationError(
            f"{path} is of no known kind: text comes from .txt, .jsonl, .parquet, .csv or .tsv files."
        )


def _table(path: Path, field: str, called: Called) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as stream:
        # Tab-separated data sets (GLUE's) don't quote, and have single quotation marks in their text.
        plain = path.suffix == ".tsv"
        rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if plain else csv.DictReader(stream)
        try:
            for number, row in enumerate(rows, 2):
                yield _value(row, field, f"{path} line {number}", called)
        except UnicodeDecodeError as error:
            raise _not_text(path, error) from None


def _jsonl(path: Path, field: str, called: Called) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise _not_text(f"{path} line {number}", error) from None
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{path} line {number} isn't JSON: {error.msg}.") from None
            yield _value(row, field, f"{path} line {number}", called)


def _not_text(where: Path | str, error: UnicodeDecodeError) -> CalibrationError:
    return CalibrationError(
        f"{where} isn't UTF-8 text: {error.reason} at byte {error.start}; convert it, or give another file."
    )


def _parquet(path: Path, field: str, called: Called) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise CalibrationError(f"{path} isn't a parquet file: {str(error).rstrip('.')}.") from None
    names = file.schema_arrow.names
    if field not in names:
        raise CalibrationError(
            f"{path} has no column {field!r}; it has {', '.join(names)}: name one by {called.field}."
        )
    for batch in file.iter_batches(columns=[field]):
        yield from (_value({field: value}, field, str(path), called) for value in batch.column(0).to_pylist())


def _value(row: Any, field: str, where: str, called: Called) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        if value is not None:
            raise CalibrationError(f"{where}: the field {field!r} holds {type(value).__name__}, not text.")
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CalibrationError(
            f"{where} has no text in the field {field!r}; it has {fields}: name one by {called.field}."
        )
    return value


def _hub(source: str, *, field: str, split: str, called: Called) -> Iterable[str]:
    import datasets

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        first = next(iter(rows), None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CalibrationError(
            f"{source} is no local file, and the hub dataset can't be opened: {told.rstrip('.')}; "
            f"give a .txt, .jsonl or .parquet file{called.instead}."
        ) from None
    if first is None:
        raise CalibrationError(f"The split {split} of {source} is empty.")
    return (_value(row, field, f"{source} ({split})", called) for row in islice(rows, None))
