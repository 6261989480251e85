"""The linear in C."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, TILE_COLUMNS, library, pointer

STRIP = 48
"""Tokens taken together in cpu.c."""


def mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    native = library()
    assert native is not None
    out, width = weight.shape
    rows = x.reshape(-1, width).contiguous()
    if rows.dtype not in DTYPES:
        return mixed_linear(rows.float(), weight, bias).to(x.dtype).view(*x.shape[:-1], out)
    threads, panels = torch.get_num_threads(), -(-out // TILE_COLUMNS)
    y = rows.new_empty(len(rows), out)
    bias = None if bias is None else bias.contiguous()
    packed, strips = torch.empty(panels, width, TILE_COLUMNS), torch.empty(threads, STRIP, width)
    sizes = (threads, len(rows), width, out, *weight.stride(), DTYPES[rows.dtype])
    parts = (rows, weight, bias, y, packed, strips)
    native.mixed_linear(*sizes, *(None if part is None else pointer(part) for part in parts))
    return y.view(*x.shape[:-1], out)
