"""The definition: unpack a slab of rows, dequantize it, multiply. Only one slab is dense at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from modelzip.kernels.bitpack import unpack

SLAB_ELEMENTS = 1 << 22
"""Weights that are dense at once: 4 million, 16 MB in fp32."""


def affine_linear(
    x: Tensor, packed: Tensor, scale: Tensor, *, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    rows = packed.shape[0]
    out = x.new_empty(*x.shape[:-1], rows)
    slab = max(1, SLAB_ELEMENTS // columns)
    for start in range(0, rows, slab):
        part = slice(start, min(start + slab, rows))
        shared = slice(None) if scale.shape[0] == 1 else part
        codes = unpack(packed[part], bits, columns).to(torch.int16) - (1 << (bits - 1))
        values = codes.to(scale.dtype).reshape(codes.shape[0], scale.shape[1], -1)
        if zero_point is not None:
            values = values - zero_point[shared].to(scale.dtype).unsqueeze(-1)
        dense = (values * scale[shared].unsqueeze(-1)).reshape(codes.shape)
        out[..., part] = x @ dense.to(x.dtype).T
    return out
