"""The column loop in C."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import library, pointer

VALUE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def gptq_columns(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    native = library()
    assert native is not None
    weight, factor, scale, zero_point = (part.float().contiguous() for part in (weight, factor, scale, zero_point))
    codes, errors = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
    half = 1 << (bits - 1)
    failed = native.gptq_columns(
        *weight.shape,
        *(pointer(part) for part in (weight, factor, scale, zero_point, codes, errors)),
        *(-half, half - 1, VALUE_DTYPES[value_dtype]),
    )
    if failed:
        raise MemoryError("no memory for a strip of rows")
    return codes, errors
