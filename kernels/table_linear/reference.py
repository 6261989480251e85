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

    table: [1 or out, entries], for the matrix or for each row. scale: [bands, groups], one for each tile of rows and
    columns that these cut the matrix into; None for 1. offset: the shape of scale, None for 0.
    """

    table: Tensor
    scale: Tensor | None
    offset: Tensor | None = None

    def rows(self, index: slice | Tensor, count: int) -> Values:
        """Of these rows of `count`. A slice is of whole bands."""
        table, scale, offset = (None if one is None else _rows(one, index, count) for one in self)
        assert table is not None
        return Values(table, scale, offset)

    def band(self, count: int) -> int:
        """Of `count` rows, those that have to be taken together."""
        return 1 if self.scale is None or len(self.scale) == 1 else count // len(self.scale)


def _rows(one: Tensor, index: slice | Tensor, count: int) -> Tensor:
    """What these rows of `count` have of [bands, ...]."""
    if len(one) == 1:
        return one
    band = count // len(one)
    return one[index // band] if isinstance(index, Tensor) else one[index.start // band : index.stop // band]


def table_linear(x: Tensor, packed: Tensor, values: Values, *, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    rows = packed.shape[0]
    out = x.new_empty(*x.shape[:-1], rows)
    band = values.band(rows)
    slab = max(1, SLAB_ELEMENTS // columns // band) * band
    for start in range(0, rows, slab):
        part = slice(start, min(start + slab, rows))
        indices = unpack(packed[part], bits, columns)
        out[..., part] = x @ table_values(indices, values.rows(part, rows), dtype=dtype).to(x.dtype).T
    return out


def table_values(indices: Tensor, values: Values, *, dtype: torch.dtype) -> Tensor:
    entries = values.table.float()
    found = entries[0][indices.long()] if len(entries) == 1 else entries.gather(1, indices.long())
    if values.scale is not None:
        bands, groups = values.scale.shape
        tiled = found.reshape(bands, len(found) // max(1, bands), groups, found.shape[1] // groups)
        tiled *= values.scale.float()[:, None, :, None]
        if values.offset is not None:
            tiled += values.offset.float()[:, None, :, None]
        found = tiled.reshape(found.shape)
    return found.to(dtype)
