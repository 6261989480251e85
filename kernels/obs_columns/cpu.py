"""The column loop in C."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, library, pointer

STRIP = 32
"""Rows taken together in cpu.c."""


def obs_columns(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    bits: int,
    kept: Tensor | None,
    pattern: tuple[int, int] | None,
    value_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    native = library()
    assert native is not None
    weight, factor = weight.float().contiguous(), factor.float().contiguous()
    grid = [None if part is None else part.float().contiguous() for part in (scale, zero_point)]
    mask = None if kept is None else kept.contiguous()
    written = torch.empty_like(weight, dtype=torch.float32 if scale is None else torch.int8)
    errors = torch.empty_like(weight)
    half = 1 << (bits - 1) if bits else 0
    threads = torch.get_num_threads()
    matrices = (None if part is None else pointer(part) for part in (weight, factor, *grid, mask, written, errors))
    scratch = torch.empty(threads, weight.shape[0], STRIP)
    levels = (-half, half - 1, DTYPES[value_dtype])
    native.obs_columns(threads, *weight.shape, *matrices, *(pattern or (0, 0)), *levels, pointer(scratch))
    if kept is not None and mask is not None and mask is not kept:
        kept.copy_(mask)
    return written, errors
