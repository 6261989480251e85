"""The column loop in C."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, constant, library, pointer


def gptq_columns(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    native = library()
    assert native is not None
    weight, factor, scale, zero_point = (part.float().contiguous() for part in (weight, factor, scale, zero_point))
    codes, errors = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
    half = 1 << (bits - 1)
    threads = torch.get_num_threads()
    matrices = (weight, factor, scale, zero_point, codes, errors)
    scratch = torch.empty(threads, weight.shape[0], constant("gptq_columns_strip"))
    levels = (-half, half - 1, constant(DTYPES[value_dtype]))
    native.gptq_columns(threads, *weight.shape, *map(pointer, matrices), *levels, pointer(scratch))
    return codes, errors
