"""The column loop in C."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64

import torch
from torch import Tensor

from modelzip.kernels.native import library, pointer

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
        *(c_int64(size) for size in weight.shape),
        *(pointer(part) for part in (weight, factor, scale, zero_point, codes, errors)),
        *(c_float(-half), c_float(half - 1), c_int(VALUE_DTYPES[value_dtype])),
    )
    if failed:
        raise MemoryError("no memory for a strip of rows")
    return codes, errors
