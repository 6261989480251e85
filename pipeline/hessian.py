"""The second moment of a linear's inputs: H = mean of x xᵀ over the tokens."""

from __future__ import annotations

from torch import Tensor

from modelzip.kernels.second_moment import add_second_moment


def accumulate(total: Tensor, inputs: Tensor) -> int:
    """Add the products of inputs [..., in] to total [in, in] (fp32), under its diagonal; returns the token count."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    add_second_moment(total, rows)
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
