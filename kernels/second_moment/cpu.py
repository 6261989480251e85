"""The symmetric update in C."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, TILE_COLUMNS, library, pointer

DEPTH = 256
"""Tokens taken together in cpu.c."""


def add_second_moment(total: Tensor, rows: Tensor) -> None:
    native = library()
    assert native is not None
    tokens, width = rows.shape
    padded = -(-width // TILE_COLUMNS) * TILE_COLUMNS
    groups, panels = torch.empty(2, min(tokens, DEPTH), padded)
    x = (rows if rows.dtype in DTYPES else rows.float()).contiguous()
    sizes = (torch.get_num_threads(), width, tokens, DTYPES[x.dtype])
    native.second_moment(*sizes, *map(pointer, (x, total, groups, panels)))
