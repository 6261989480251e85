"""Labelled examples: texts, or pairs of texts, with a class or a number each. Nothing is dropped without being said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CalibrationError

from .called import EVALUATE, Called
from .labels import class_ids
from .padding import Padding, padded, padding_of
from .rows import read_table

TEXTS: Final = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", ""),
    ("sentence", ""),
    ("question", ""),
)
"""Columns that hold texts and their pairs where nobody named any."""

LABELS: Final = ("label", "labels", "class", "score")


@dataclass(frozen=True)
class Examples:
    """pairs: each text's second text, None if there are none. labels: class ids, or numbers for a regression.

    names: of the classes, in the order of their ids; empty for a regression.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[int, ...] | tuple[float, ...]
    names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """SHA-256 over texts, pairs, labels and names."""
        found = hashlib.sha256(json.dumps(self.names).encode())
        for row in zip(self.texts, self.pairs or self.texts, self.labels or self.texts, strict=True):
            found.update(json.dumps(row).encode())
        return found.hexdigest()

    def split(self, count: int) -> tuple[Examples, Examples]:
        """The first `count` examples, and those after them."""
        return self._part(slice(count)), self._part(slice(count, None))

    def _part(self, part: slice) -> Examples:
        pairs = None if self.pairs is None else self.pairs[part]
        return replace(self, texts=self.texts[part], pairs=pairs, labels=self.labels[part])


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are used. pair: empty if there is none."""

    text: str
    pair: str
    label: str


@dataclass(frozen=True)
class Batch:
    """rows: int64 [batch], the places of the batch's examples among all. inputs: each [batch, length], padded."""

    rows: Tensor
    inputs: Mapping[str, Tensor]


def read_examples(
    source: str,
    *,
    split: str = "train",
    text: str = "",
    pair: str = "",
    label: str = "",
    names: Sequence[str] | None = None,
    count: int | None = None,
    called: Called = EVALUATE,
) -> Examples:
    """The first `count` examples of a file or hub dataset; all without `count`.

    text, pair, label: column names; empty ones are found by the names that are usual, and a `text` that is named
    stands alone unless a `pair` is named too. names: the classes that a model knows, in the order of its ids; empty
    for one that predicts a number; None takes them from the data: those that a dataset states, whole numbers as they
    are, words in sorted order, other numbers as a regression. called: how those who can mend it know the settings.
    All rows are checked, also with `count`. Raises CalibrationError that names the first line that is wrong, or the
    columns that are there.
    """
    table = read_table(source, split=split)
    columns = find_columns(table.columns, source, text=text, pair=pair, label=label, called=called)
    texts: list[str] = []
    pairs: list[str] = []
    labels: list[Any] = []
    places: list[str] = []
    for where, row in table.rows:
        texts.append(_text(row, columns.text, where))
        if columns.pair:
            pairs.append(_text(row, columns.pair, where))
        labels.append(row.get(columns.label))
        places.append(where)
    if not texts:
        raise CalibrationError(f"{source} holds no examples below its first line: give a file with some.")
    found, classes = class_ids(labels, places, columns.label, names=names, stated=table.classes.get(columns.label))
    whole = Examples(tuple(texts), tuple(pairs) if columns.pair else None, found, classes, source)
    return whole if count is None else whole.split(count)[0]


def read_texts(
    source: str, *, split: str = "train", text: str = "", pair: str = "", label: str = "", called: Called
) -> Examples:
    """Texts or pairs of texts; where pairs have labels as well, these are read as numbers. Raises CalibrationError."""
    table = read_table(source, split=split)
    labels = [label] if label else [name for name in LABELS if name in table.columns]
    placeholder = labels[0] if labels else table.columns[0]
    columns = find_columns(table.columns, source, text=text, pair=pair, label=placeholder, called=called)
    if columns.pair and labels:
        return read_examples(source, split=split, text=text, pair=pair, label=label, names=(), called=called)
    texts: list[str] = []
    pairs: list[str] = []
    for where, row in table.rows:
        texts.append(_text(row, columns.text, where))
        if columns.pair:
            pairs.append(_text(row, columns.pair, where))
    if not texts:
        raise CalibrationError(f"{source} holds no examples below its first line: give a file with some.")
    return Examples(tuple(texts), tuple(pairs) if columns.pair else None, (), (), source)


def find_columns(
    names: Sequence[str], source: str, *, text: str = "", pair: str = "", label: str = "", called: Called
) -> Columns:
    """Which columns hold texts, pairs and labels. Raises CalibrationError if one is missing or can't be told."""
    there = ", ".join(names)
    for setting, named in ((called.text, text), (called.pair, pair), (called.label, label)):
        if named and named not in names:
            raise CalibrationError(f"{source} has no column {named!r}; it has {there}: name one by {setting}.")
    if not text:
        known = [(one, two) for one, two in TEXTS if one in names and (two in names or not two)]
        if pair:
            known = [(one, two) for one, two in known if two == pair] or [
                (one, pair) for one, two in known if not two and one != pair
            ]
        else:  # a column that is part of a pair isn't also meant alone
            paired = {name for couple in known if couple[1] for name in couple}
            known = [(one, two) for one, two in known if two or one not in paired]
        if len(known) != 1:
            several = " and ".join("/".join(filter(None, couple)) for couple in known)
            problem = f"may mean {several} as its text" if known else "has no column that is known to hold text"
            raise CalibrationError(
                f"{source} {problem}; it has {there}: name one by {called.text}, a second text by {called.pair}. Files "
                "need a first line that names the columns."
            )
        text, pair = known[0]
    if not label:
        usual = [name for name in LABELS if name in names]
        if len(usual) != 1:
            problem = f"may mean {' and '.join(usual)}" if usual else "has no column that is known to hold labels"
            raise CalibrationError(f"{source} {problem}; it has {there}: name one by {called.label}.")
        label = usual[0]
    return Columns(text, pair, label)


def encode(examples: Examples, tokenizer: Any, *, max_length: int) -> list[dict[str, list[int]]]:
    """Each example's arguments of the model's forward, cut at `max_length` tokens, special tokens among them."""
    second = [] if examples.pairs is None else [list(examples.pairs)]
    made = tokenizer(list(examples.texts), *second, truncation=True, max_length=max_length, verbose=False)
    return [{name: made[name][row] for name in made} for row in range(len(examples))]


def count_cut(
    examples: Examples, encoded: Sequence[Mapping[str, list[int]]], tokenizer: Any, *, max_length: int
) -> int:
    """How many examples `encode` had to cut at `max_length` tokens."""
    full = [row for row, one in enumerate(encoded) if len(one["input_ids"]) >= max_length]
    cut = 0
    for row in full:
        second = [] if examples.pairs is None else [examples.pairs[row]]
        cut += len(tokenizer(examples.texts[row], *second, verbose=False)["input_ids"]) > max_length
    return cut


def batches_by_length(
    encoded: Sequence[Mapping[str, Sequence[int]]], tokenizer: Any, *, batch_size: int
) -> list[Batch]:
    """Padded batches of examples of like length, the longest first, so that memory peaks at the start.

    Without a padding token each example is a batch of its own.
    """
    padding = padding_of(tokenizer)
    if padding is None:
        padding, batch_size = Padding(0, 0, "right"), 1
    lengths = torch.tensor([len(one["input_ids"]) for one in encoded])
    order = torch.sort(lengths, descending=True, stable=True).indices
    return [
        Batch(rows, padded([encoded[row] for row in rows.tolist()], padding)) for rows in torch.split(order, batch_size)
    ]


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if column in row:
        raise CalibrationError(f"{where}: the column {column!r} holds {type(value).__name__}, not text.")
    raise CalibrationError(f"{where} has no {column!r}; it has {', '.join(row)}: every row needs the same columns.")
