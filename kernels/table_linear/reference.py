"""The definition: unpack a slab of rows, look its values up, multiply. Only one slab is dense at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modelzip.kernels.bitpack import unpack

SLAB_ELEMENTS = 1 << 22
"""Weights that are dense at once: 4 million, 16 MB in fp32."""


class Values(NamedTuple):
    """What indices stand for: table entry times scale plus offset.

    table: [1 or out, entries], for the matrix or for each row. scale: [1 or out, groups], None for 1. offset: the shape
    of scale, None for 0.
    """

    table: Tensor
    scale: Tensor | None
    offset: Tensor | None = None

    def rows(self, index: slice | Tensor) -> Values:
        """Of these rows."""
        table, scale, offset = (one if one is None or len(one) == 1 else one[index] for one in self)
        assert table is not None
        return Values(table, scale, offset)


def table_linear(x: Tensor, packed: Tensor, values: Values, *, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    rows = packed.shape[0]
    out = x.new_empty(*x.shape[:-1], rows)
    slab = max(1, SLAB_ELEMENTS // columns)
    for start in range(0, rows, slab):
        part = slice(start, min(start + slab, rows))
        indices = unpack(packed[part], bits, columns)
        out[..., part] = x @ table_values(indices, values.rows(part), dtype=dtype).to(x.dtype).T
    return out


def table_values(indices: Tensor, values: Values, *, dtype: torch.dtype) -> Tensor:
    entries = values.table.float()
    found = entries[0][indices.long()] if len(entries) == 1 else entries.gather(1, indices.long())
    if values.scale is not None:
        grouped = found.reshape(len(found), values.scale.shape[1], -1).mul_(values.scale.float().unsqueeze(-1))
        if values.offset is not None:
            grouped += values.offset.float().unsqueeze(-1)
        found = grouped.reshape(found.shape)
    return found.to(dtype)
