"""The second moments of a linear's inputs over the tokens: H = the mean of x xᵀ, or its diagonal alone."""

from __future__ import annotations

import torch
from torch import Tensor

from modelzip.kernels.second_moment import add_second_moment

SLAB = 1024
"""Tokens whose squares are in memory at once."""


def accumulate(total: Tensor, inputs: Tensor) -> int:
    """Add the products of inputs [..., in] to total [in, in] (fp32), under its diagonal, or the squares to total [in].

    Returns the token count.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if total.ndim == 1:
        for part in torch.split(rows, SLAB):
            total.add_(part.float().square().sum(0))
    else:
        add_second_moment(total, rows)
    return rows.shape[0]


def widen(largest: Tensor, inputs: Tensor) -> None:
    """Raise largest [in], fp32, to the largest magnitudes of inputs [..., in]."""
    for part in torch.split(inputs.reshape(-1, inputs.shape[-1]), SLAB):
        torch.maximum(largest, part.float().abs().amax(0), out=largest)


def finish(total: Tensor, tokens: int) -> Tensor:
    """The mean over tokens, with the upper half filled from the lower; `total` is used up."""
    if tokens == 0:
        return total
    if total.ndim == 1:
        return total.div_(tokens)
    total.tril_().div_(tokens)
    return total.add_(total.tril(-1).T)


def relative_error(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    """‖(W − Ŵ)X‖ / ‖WX‖ for weight and dense [out, in]: the relative error of the layer's output."""
    lost = weight - dense
    kept = float(((weight @ hessian) * weight).sum())
    return (max(0.0, float(((lost @ hessian) * lost).sum())) / kept) ** 0.5 if kept > 0 else 0.0
