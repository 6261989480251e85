"""The linear in C."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, constant, library, pointer

SPAN_BYTES = 8 << 20
"""Weights that are laid out at once: few enough for the last cache, and little beside the weight itself."""


def mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    native = library()
    assert native is not None
    out, width = weight.shape
    rows = x.reshape(-1, width).contiguous()
    if rows.dtype not in DTYPES:
        return mixed_linear(rows.float(), weight, bias).to(x.dtype).view(*x.shape[:-1], out)
    threads = torch.get_num_threads()
    strip, panel = constant("mixed_linear_strip"), constant("mixed_linear_tile_columns")
    span = panel * min(-(-out // panel), max(1, SPAN_BYTES // (4 * panel * width)))
    y = rows.new_empty(len(rows), out)
    bias = None if bias is None else bias.contiguous()
    packed, strips = torch.empty(span, width), torch.empty(threads, strip, width)
    sizes = (threads, len(rows), width, out, *weight.stride(), span, constant(DTYPES[rows.dtype]))
    parts = (rows, weight, bias, y, packed, strips)
    native.mixed_linear(*sizes, *(None if part is None else pointer(part) for part in parts))
    return y.view(*x.shape[:-1], out)
