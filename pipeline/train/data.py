"""What is learned from: read and checked before anything runs, turned into tokens when it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CalibrationError
from modelzip.compressors.distill.logits import IGNORED
from modelzip.compressors.distill.settings import DistillSettings
from modelzip.compressors.distill.settings_students import Sequence as Written

from ..called import PROMPTS, TRAINING
from ..labelled import LABELS, Examples, count_cut, encode, read_examples, read_texts
from ..padding import Padding
from ..rows import read_table
from ..text import check_source, read_windows
from .lesson import Predicts
from .material import Masking, Material

ALL: Final = 1 << 24
"""More windows than any text file has."""


@dataclass(frozen=True, eq=False)
class Data:
    """Texts with or without labels, or running text, which is read when it is tokenized (examples is None).

    written: how many texts a teacher is to write, with their beginnings from `source` if it is a file.
    """

    source: str
    split: str
    column: str
    examples: Examples | None
    written: int = 0

    @property
    def count(self) -> int | None:
        """Examples, or texts that will be written; None of running text."""
        return self.written or None if self.examples is None else len(self.examples)

    @property
    def is_labelled(self) -> bool:
        """Whether each text has a label."""
        return self.examples is not None and bool(self.examples.labels)

    def sha256(self) -> str:
        """Over what was read; of running text over the file's size and time."""
        found = hashlib.sha256(self.source.encode())
        if self.examples is not None:
            found.update(json.dumps([self.examples.texts, self.examples.pairs, self.examples.labels]).encode())
        elif Path(self.source).is_file():
            stat = Path(self.source).stat()
            found.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        return found.hexdigest()


def is_running_text(settings: DistillSettings, source: str, split: str) -> bool:
    """Whether a source, of a task that isn't named, is for language modelling: it has no labels."""
    if settings.task != "auto":
        return settings.task == "language-modelling"
    return Path(source).suffix == ".txt" or not _has_labels(settings, source, split)


def _has_labels(settings: DistillSettings, source: str, split: str) -> bool:
    columns = read_table(source, split=split).columns
    return bool(settings.label_column) or any(name in columns for name in LABELS)


def read_data(
    settings: DistillSettings, source: str, split: str, *, names: Sequence[str] | None, labels: bool | None
) -> Data:
    """Texts, with labels if `labels` (None: if there are any). names: see `read_examples`. Raises CalibrationError."""
    text, pair, label = settings.text_column, settings.pair_column, settings.label_column
    if labels is None:
        labels = _has_labels(settings, source, split)
    if labels:
        found = read_examples(source, split=split, text=text, pair=pair, label=label, names=names, called=TRAINING)
    else:
        found = read_texts(source, split=split, text=text, pair=pair, called=TRAINING)
    return Data(source, split, text, found)


def running_text(settings: DistillSettings, source: str, split: str) -> Data:
    """A text that will be cut into windows. Raises CalibrationError if it is missing or empty."""
    column = settings.text_column or "text"
    if Path(source).suffix in (".tsv", ".csv"):
        known = settings.task == "language-modelling" or isinstance(settings, Written)
        problem = "is a table" if known else "holds no labels"
        mend = "give such a file" if known else "name the column of the labels by label_column, or give such a file"
        raise CalibrationError(
            f"{source} {problem}, and running text comes from .txt, .jsonl or .parquet files: {mend}."
        )
    check_source(source, field=column, called=TRAINING)
    return Data(source, split, column, None)


def prompts_of(data: Data, tokenizer: Any, *, length: int) -> Tensor:
    """The beginnings of texts, int64 [any, length], of `data.written` texts at most. Raises CalibrationError."""
    return read_windows(
        data.source,
        tokenizer,
        field=data.column,
        split=data.split,
        count=data.written,
        seq_len=length,
        least=1,
        called=PROMPTS,
    ).tokens


def written_material(texts: Tensor, settings: Written, padding: Padding) -> Material:
    """A teacher's texts int64 [texts, length] to learn from, but for the prompts that they begin with."""
    labels = texts.clone()
    labels[:, : settings.prompt_length] = IGNORED
    ones = [1] * texts.shape[1]
    return Material([{"input_ids": row, "attention_mask": ones} for row in texts.tolist()], labels, padding)


def material_of(
    data: Data,
    tokenizer: Any,
    *,
    predicts: Predicts,
    padding: Padding,
    max_length: int,
    masking: Masking | None,
) -> tuple[Material, str | None]:
    """The data as tokens, and a sentence if some of it had to be cut."""
    if data.examples is None:
        windows = read_windows(
            data.source,
            tokenizer,
            field=data.column,
            split=data.split,
            count=ALL // max_length,
            seq_len=max_length,
            least=1,
            called=TRAINING,
        )
        ones = [1] * max_length
        rows = [{"input_ids": row, "attention_mask": ones} for row in windows.tokens.tolist()]
        return Material(rows, None, padding, masking), None
    rows = encode(data.examples, tokenizer, max_length=max_length)
    labels = None
    if data.is_labelled:
        labels = torch.tensor(data.examples.labels, dtype=torch.float32 if predicts == "number" else torch.int64)
    cut = count_cut(data.examples, rows, tokenizer, max_length=max_length)
    note = f"{cut} of {len(rows)} texts of {data.source} were cut at {max_length} tokens" if cut else None
    return Material(rows, labels, padding, masking), note


def masking_of(tokenizer: Any, vocabulary: int, seed: int) -> Masking | None:
    """How tokens are hidden from a masked language model; None if its tokenizer has no mask."""
    if tokenizer.mask_token_id is None:
        return None
    return Masking(tokenizer.mask_token_id, frozenset(tokenizer.all_special_ids), vocabulary, seed)
