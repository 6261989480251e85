"""The symmetric update in C."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, constant, library, pointer


def add_second_moment(total: Tensor, rows: Tensor) -> None:
    native = library()
    assert native is not None
    tokens, width = rows.shape
    panel = constant("second_moment_tile_columns")
    padded = -(-width // panel) * panel
    groups, panels = torch.empty(2, min(tokens, constant("second_moment_depth")), padded)
    x = (rows if rows.dtype in DTYPES else rows.float()).contiguous()
    sizes = (torch.get_num_threads(), width, tokens, constant(DTYPES[x.dtype]))
    native.second_moment(*sizes, *map(pointer, (x, total, groups, panels)))
