"""Rows of unlike lengths as one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """What fills short rows. side: left or right."""

    token: int
    segment: int
    side: str


def padded(rows: Sequence[Mapping[str, Sequence[int]]], padding: Padding) -> dict[str, Tensor]:
    """Each argument as int64 [rows, longest]."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": padding.token, "token_type_ids": padding.segment}
    made = {}
    for name in rows[0]:
        values = torch.full((len(rows), longest), fill.get(name, 0), dtype=torch.int64)
        for line, row in zip(values, rows, strict=True):
            start = longest - len(row[name]) if padding.side == "left" else 0
            line[start : start + len(row[name])] = torch.tensor(row[name], dtype=torch.int64)
        made[name] = values
    return made


def padding_of(tokenizer: Any, config: Any = None) -> Padding | None:
    """How a model's rows are filled; None if neither its tokenizer nor its config has a padding token."""
    token = tokenizer.pad_token_id
    if token is None:
        token = getattr(config, "pad_token_id", None)
    return None if token is None else Padding(token, tokenizer.pad_token_type_id, tokenizer.padding_side)
