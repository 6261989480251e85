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


class LeastSquares:
    """The weight that serves several layers best, from sums to which one layer after the other is added.

    Of each layer: its weight W_l [out, in], and H_l [in, in], the mean of x xᵀ over its inputs. The solution minimises
    Σ ‖(W − W_l) X_l‖² + λ ‖W − W̄‖² a token, with W̄ the layers' mean and λ the damping times the mean diagonal of Σ H_l:
    in directions that no input has, W is the mean. It is W = W̄ + (Σ (W_l − W̄) H_l) (Σ H_l + λI)⁻¹.
    """

    def __init__(self) -> None:
        nothing = torch.zeros((), dtype=torch.float64)
        self._weights, self._hessians, self._products = nothing, nothing, nothing
        self._outputs = 0.0
        self._count = 0

    def add(self, weight: Tensor, hessian: Tensor) -> None:
        """Take one more layer into account."""
        weight, hessian = weight.double(), hessian.double()
        self._weights = self._weights + weight
        self._hessians = self._hessians + hessian
        products = weight @ hessian
        self._products = self._products + products
        self._outputs += float((products * weight).sum())
        self._count += 1

    def mean(self) -> Tensor:
        """W̄ [out, in], fp32."""
        return (self._weights / self._count).float()

    def error(self, weight: Tensor) -> float:
        """Σ ‖(W − W_l) X_l‖² as a share of Σ ‖W_l X_l‖², its root: the relative error of all layers' outputs."""
        weight = weight.double()
        lost = float(((weight @ self._hessians - 2 * self._products) * weight).sum()) + self._outputs
        return (max(0.0, lost) / self._outputs) ** 0.5 if self._outputs > 0 else 0.0

    def solve(self, *, damping: float) -> Tensor:
        """W [out, in], fp32, for one or more layers. Raises UnsuitableError."""
        hessians = self._hessians.clone()
        if not torch.isfinite(hessians).all():
            raise UnsuitableError("the Hessian isn't finite: an activation overflowed")
        mean = self._weights / self._count
        differences = self._products - mean @ hessians
        level = float(hessians.diagonal().mean())
        hessians.diagonal().add_(damping * level if level > 0 else 1.0)
        factor, info = torch.linalg.cholesky_ex(hessians)
        if int(info) != 0:
            raise UnsuitableError(f"the sum of the layers' Hessians isn't positive definite with damping {damping:g}")
        change: Tensor = torch.cholesky_solve(differences.T, factor).T
        return (mean + change).float()
