"""One set of weights for several layers.

Lan et al. 2019, "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", section 3.1, trains
shared layers from scratch. To share the layers of a trained model a start is needed: the layers' mean, or the weight W
that comes closest to what each layer's own weight W_l makes of that layer's inputs X_l.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from modelzip.compressors.layer import UnsuitableError


def runs(layers: int, groups: int) -> tuple[range, ...]:
    """`layers` neighbouring layers in `groups` runs as equal as can be, the longer ones first."""
    size, longer = divmod(layers, groups)
    starts = [group * size + min(group, longer) for group in range(groups + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def average(weights: Iterable[Tensor]) -> Tensor:
    """The mean of one or more tensors of one shape, fp32."""
    each = iter(weights)
    total, count = next(each).to(torch.float64, copy=True), 1
    for weight in each:
        total += weight
        count += 1
    return (total / count).float()


def least_squares(layers: Iterable[tuple[Tensor, Tensor]], *, damping: float) -> Tensor:
    """The weight [out, in], fp32, that serves one or more layers (W_l [out, in], H_l [in, in]) best.

    H_l: the mean of x xᵀ over the inputs of layer l. W minimises Σ ‖(W − W_l) X_l‖² + λ ‖W − W̄‖² a token, with W̄ the
    layers' mean and λ the damping times the mean diagonal of Σ H_l: in directions that no input has, W is the mean.
    The solution is W = W̄ + (Σ (W_l − W̄) H_l) (Σ H_l + λI)⁻¹. Layers are taken one at a time. Raises UnsuitableError.
    """
    each = iter(layers)
    weights, hessians = (tensor.to(torch.float64, copy=True) for tensor in next(each))
    products, count = weights @ hessians, 1
    for weight, hessian in each:
        weights += weight
        hessians += hessian
        products += weight.double() @ hessian.double()
        count += 1
    if not torch.isfinite(hessians).all():
        raise UnsuitableError("the Hessian isn't finite: an activation overflowed")
    mean = weights / count
    differences = products - mean @ hessians
    level = float(hessians.diagonal().mean())
    hessians.diagonal().add_(damping * level if level > 0 else 1.0)
    factor, info = torch.linalg.cholesky_ex(hessians)
    if int(info) != 0:
        raise UnsuitableError(f"the sum of the layers' Hessians isn't positive definite with damping {damping:g}")
    change: Tensor = torch.cholesky_solve(differences.T, factor).T
    return (mean + change).float()
