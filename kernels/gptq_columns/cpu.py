"""The column loop in C."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import in_parts, library, pointer

VALUE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

LEAST_ROWS = 128
"""Rows that are worth a thread of their own; a multiple of the strip in cpu.c."""


def gptq_columns(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    native = library()
    assert native is not None
    weight, factor, scale, zero_point = (part.float().contiguous() for part in (weight, factor, scale, zero_point))
    codes, errors = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
    half = 1 << (bits - 1)
    given = (
        *weight.shape,
        *(pointer(part) for part in (weight, factor, scale, zero_point, codes, errors)),
        *(-half, half - 1, VALUE_DTYPES[value_dtype]),
    )
    in_parts(lambda begin, end: int(native.gptq_columns(begin, end, *given)), weight.shape[1], least=LEAST_ROWS)
    return codes, errors
