"""The rounding errors in C: all grids while a group is in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import in_parts, library, pointer

LEAST_GROUPS = 256
"""Groups that are worth a thread of their own."""


def rounding_errors(
    grouped: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, root: Tensor | None
) -> Tensor:
    native = library()
    assert native is not None
    parts = [None if part is None else part.float().contiguous() for part in (grouped, scale, zero_point, root)]
    norms = torch.empty(scale.shape)
    rows, groups, size = grouped.shape
    half = 1 << (bits - 1)
    given = (
        *(scale.shape[0], rows * groups, size, groups),
        *(None if part is None else pointer(part) for part in (*parts, norms)),
        *(-half, half - 1),
    )
    in_parts(lambda begin, end: int(native.rounding_errors(begin, end, *given)), rows * groups, least=LEAST_GROUPS)
    return norms
