"""The second moment of a linear's inputs: H = mean of x xᵀ over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 128
"""Columns of a panel: only panels on and under the diagonal are computed."""

CAST_TOKENS = 1024
"""Tokens that are cast to fp32 at once. More take more memory and no less time."""


def accumulate(total: Tensor, inputs: Tensor) -> int:
    """Add the products of inputs [..., in] to the lower panels of total [in, in] (fp32); returns the token count.

    H is symmetric, so this is a symmetric rank-k update: (1 + 1/panels) / 2 of the full product's work.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    width = total.shape[0]
    for part in torch.split(rows, CAST_TOKENS):
        x = part.to(total.dtype)
        for start in range(0, width, PANEL):
            stop = min(start + PANEL, width)
            total[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
    return rows.shape[0]


def finish(total: Tensor, tokens: int) -> Tensor:
    """The mean over tokens, with the upper half filled from the lower; `total` is used up."""
    if tokens == 0:
        return total
    total.tril_().div_(tokens)
    return total.add_(total.tril(-1).T)


def relative_error(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    """‖(W − Ŵ)X‖ / ‖WX‖ for weight and dense [out, in]: the relative error of the layer's output."""
    lost = weight - dense
    kept = float(((weight @ hessian) * weight).sum())
    return (max(0.0, float(((lost @ hessian) * lost).sum())) / kept) ** 0.5 if kept > 0 else 0.0
