"""Text from files and data sets, cut into windows of tokens. Nothing is dropped without being said."""

from __future__ import annotations

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

CHARACTERS_PER_TOKEN = 24
"""Text read for each token wanted; what lies beyond in a long source is not tokenized."""

LEAST_CHARACTERS = 1 << 23


@dataclass(frozen=True)
class Windows:
    """tokens: int64 [windows, seq_len]. sha256: of the tokens. spare: tokens of the text that no window holds."""

    tokens: Tensor
    source: str
    spare: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def batches(self, size: int) -> list[Tensor]:
        return list(self.tokens.split(size))


def read_windows(
    source: str,
    tokenizer: Any,
    *,
    field: str,
    split: str,
    count: int,
    seq_len: int,
    skip: int = 0,
    least: int | None = None,
) -> Windows:
    """`count` windows of `seq_len` tokens from a file or hub dataset, after the first `skip` windows.

    The documents are joined by blank lines and tokenized in one go, no special tokens added, and cut without overlap.
    With `least`, fewer windows down to that number will do. Raises CalibrationError if the source holds too little.
    """
    needed = (skip + count) * seq_len
    text = _text(source, field=field, split=split, characters=max(LEAST_CHARACTERS, needed * CHARACTERS_PER_TOKEN))
    if not text.strip():
        raise CalibrationError(f"{source} holds no text: give a file with at least {needed} tokens.")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    whole = max(0, len(ids) // seq_len - skip)
    if whole < (count if least is None else least):
        raise CalibrationError(
            f"{source} holds {len(ids)} tokens, enough for {len(ids) // seq_len} windows of {seq_len}; "
            f"{skip + count} were asked for: give more text, or lower --samples or --seq-len."
        )
    taken = min(whole, count)
    start = skip * seq_len
    return Windows(
        ids[start : start + taken * seq_len].reshape(taken, seq_len), source, len(ids) - start - taken * seq_len
    )


def check_source(source: str, *, field: str) -> None:
    """Raise CalibrationError if a local file is missing, empty, of an unknown kind, or lacks the field."""
    if not _is_file(source):
        return
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(f"There is no file {source}: check the path of the calibration or evaluation text.")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{source} is empty: give a file with text.")
    next(_documents(path, field), None)


def _is_file(source: str) -> bool:
    path = Path(source)
    return path.exists() or path.suffix in {".txt", ".jsonl", ".parquet", ".json", ".csv", ".md"}


def _text(source: str, *, field: str, split: str, characters: int) -> str:
    documents = _documents(Path(source), field) if _is_file(source) else _hub(source, field=field, split=split)
    pieces, length = [], 0
    for document in documents:
        pieces.append(document)
        length += len(document) + 2
        if length >= characters:
            break
    text = "\n\n".join(pieces)
    if len(text) <= characters:
        return text
    end = text.rfind("\n", 0, characters)
    return text[: end if end > 0 else characters]


def _documents(path: Path, field: str) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _parquet(path, field)
    elif path.suffix == ".jsonl":
        yield from _jsonl(path, field)
    elif path.suffix == ".txt":
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} isn't UTF-8 text: {error.reason} at byte {error.start}.") from None
    else:
        raise CalibrationError(f"{path} is of no known kind: text comes from .txt, .jsonl or .parquet files.")


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{path} line {number} isn't JSON: {error.msg}.") from None
            yield _value(row, field, f"{path} line {number}")


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise CalibrationError(f"{path} isn't a parquet file: {error}.") from None
    names = file.schema_arrow.names
    if field not in names:
        raise CalibrationError(f"{path} has no column {field!r}; it has {', '.join(names)}: name one by --field.")
    for batch in file.iter_batches(columns=[field]):
        yield from (_value({field: value}, field, str(path)) for value in batch.column(0).to_pylist())


def _value(row: Any, field: str, where: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CalibrationError(f"{where} has no text in the field {field!r}; it has {fields}: name one by --field.")
    return value


def _hub(source: str, *, field: str, split: str) -> Iterable[str]:
    import datasets

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        first = next(iter(rows), None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CalibrationError(
            f"{source} is no local file, and the hub dataset can't be opened: {told.rstrip('.')}; "
            "give a .txt, .jsonl or .parquet file, or --calibration self."
        ) from None
    if first is None:
        raise CalibrationError(f"The split {split} of {source} is empty.")
    return (_value(row, field, f"{source} ({split})") for row in islice(rows, None))
