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
    # A step is a dozen operations on one short column: taking all rows apart beforehand saves a third of it.
    rows = (part.unbind(0) for part in (weight, codes, errors, scale, scale.reciprocal(), zero_point))
    inverse_diagonal = factor.diagonal().reciprocal().tolist()
    for j, (column, code, error, step, inverse_step, zero) in enumerate(zip(*rows, strict=True)):
        torch.mul(column, inverse_step, out=code)
        code.round_().add_(zero).clamp_(low, high)
        torch.sub(code, zero, out=error)
        value = error.mul_(step).to(value_dtype)
        torch.sub(column, value, out=error)
        error.mul_(inverse_diagonal[j])
        stop = min(block, (j // INNER + 1) * INNER)
        if j + 1 < stop:
            weight[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        elif stop < block:
            start = stop - INNER
            weight[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return codes, errors
