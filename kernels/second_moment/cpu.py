"""The symmetric update in C: for AVX2, and of bf16 rows for AVX-512 BF16."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, constant, library, pointer


def add_second_moment(total: Tensor, rows: Tensor) -> None:
    native = library()
    assert native is not None
    tokens, width = rows.shape
    columns = _padded(width, constant("second_moment_tile_columns"))
    groups, panels = torch.empty(2, min(tokens, constant("second_moment_depth")), columns)
    x = (rows if rows.dtype in DTYPES else rows.float()).contiguous()
    sizes = (torch.get_num_threads(), width, tokens, constant(DTYPES[x.dtype]))
    native.second_moment(*sizes, *map(pointer, (x, total, groups, panels)))


def add_pairs(total: Tensor, rows: Tensor) -> None:
    """The same for bf16 rows."""
    native = library()
    assert native is not None
    tokens, width = rows.shape
    columns = _padded(width, constant("second_moment_pairs_columns"))
    panels = torch.empty(constant("second_moment_pairs_depth") // 2, columns, dtype=torch.int32)
    parts = (rows.contiguous(), total, panels)
    native.second_moment_pairs(torch.get_num_threads(), width, tokens, *map(pointer, parts))


def _padded(width: int, panel: int) -> int:
    """The next multiple of a panel's columns."""
    return -(-width // panel) * panel
