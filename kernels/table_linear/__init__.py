"""x @ W.T for W in packed indices into tables of values, from the packed form."""

from __future__ import annotations

import torch
from torch import Tensor

from modelzip.kernels.bitpack import packed_words

from . import reference
from .reference import Values

__all__ = ["Values", "table_linear", "table_values"]


def table_linear(x: Tensor, packed: Tensor, values: Values, *, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    """x [..., columns] times the matrix that packed [out, words] stands for, transposed.

    Values are computed in fp32 and rounded to dtype. Returns [..., out] in x's dtype. Never keeps a dense copy of the
    matrix. Raises ValueError on shapes that don't fit.
    """
    table, scale, offset = values
    if x.shape[-1] != columns:
        raise ValueError(f"x has {x.shape[-1]} columns; the weight has {columns}")
    if packed.shape[1] != packed_words(columns, bits) or table.shape[1] != 1 << bits:
        raise ValueError(
            f"packed {tuple(packed.shape)} and table {tuple(table.shape)} don't fit {columns} columns of {bits} bits"
        )
    if scale is not None and (columns % scale.shape[1] or len(packed) % max(1, len(scale))):
        raise ValueError(f"scale {tuple(scale.shape)} doesn't fit {len(packed)} rows of {columns} columns")
    if offset is not None and (scale is None or offset.shape != scale.shape):
        raise ValueError(f"offset {tuple(offset.shape)} has no scale of its shape")
    return reference.table_linear(x, packed, values, bits=bits, columns=columns, dtype=dtype)


def table_values(indices: Tensor, values: Values, *, dtype: torch.dtype) -> Tensor:
    """The values [rows, columns] of indices uint8 [rows, columns]; of these rows."""
    return reference.table_values(indices, values, dtype=dtype)
