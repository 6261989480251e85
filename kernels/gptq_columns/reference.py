"""The column loop in plain torch, in two levels so that the rank-one updates stay small and the rest is one product."""

from __future__ import annotations

import torch
from torch import Tensor

INNER = 16
"""Columns updated one by one before a matrix product brings the rest of the block up to date."""


def gptq_columns(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    block = weight.shape[0]
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    inverse_diagonal = factor.diagonal().reciprocal().tolist()
    for start in range(0, block, INNER):
        stop = min(start + INNER, block)
        for j in range(start, stop):
            code, error = codes[j], errors[j]
            torch.div(weight[j], scale[j], out=code)
            code.round_().add_(zero_point[j]).clamp_(low, high)
            torch.sub(code, zero_point[j], out=error)
            value = error.mul_(scale[j]).to(value_dtype)
            torch.sub(weight[j], value, out=error)
            error.mul_(inverse_diagonal[j])
            if j + 1 < stop:
                weight[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        if stop < block:
            weight[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return codes, errors
