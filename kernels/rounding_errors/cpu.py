"""The rounding errors in C: all grids while a group is in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import library, pointer


def rounding_errors(
    grouped: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, root: Tensor | None
) -> Tensor:
    native = library()
    assert native is not None
    parts = [None if part is None else part.float().contiguous() for part in (grouped, scale, zero_point, root)]
    norms = torch.empty(scale.shape)
    rows, groups, size = grouped.shape
    half = 1 << (bits - 1)
    pointers = (None if part is None else pointer(part) for part in (*parts, norms))
    sizes = (scale.shape[0], rows * groups, size, groups)
    native.rounding_errors(torch.get_num_threads(), *sizes, *pointers, -half, half - 1)
    return norms
