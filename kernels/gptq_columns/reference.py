"""The column loop in plain torch, in two levels so that the rank-one updates stay small and the rest is one product.

A step is a handful of operations on one short column, so that each costs more to call than to compute: what can be done
for a whole block is done before or after the loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

INNER = 16
"""Columns updated one by one before a matrix product brings the rest of the block up to date."""


def gptq_columns(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    block = weight.shape[0]
    half = 1 << (bits - 1)
    lowest, highest = (-half - zero_point).unbind(0), (half - 1 - zero_point).unbind(0)
    levels, errors = torch.empty_like(weight), torch.empty_like(weight)  # a level is a code less its zero point
    inverse_diagonal = factor.diagonal().reciprocal()
    weigh = inverse_diagonal.tolist()
    rows = (part.unbind(0) for part in (weight, levels, errors, scale))
    for j, (column, level, error, step) in enumerate(zip(*rows, strict=True)):
        torch.div(column, step, out=level)
        torch.clamp(level.round_(), lowest[j], highest[j], out=level)
        torch.sub(column, torch.mul(level, step, out=error).to(value_dtype), out=error)
        start = j // INNER * INNER
        stop = min(block, start + INNER)
        if j + 1 < stop:
            weight[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-weigh[j])
        else:
            errors[start:stop].mul_(inverse_diagonal[start:stop, None])
            weight[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return levels.add_(zero_point).to(torch.int8), errors
