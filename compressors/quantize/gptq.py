"""GPTQ: quantize a matrix column by column, spreading each column's error over the columns still to come.

Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1. W is the weight, H the Hessian 2XXᵀ (up to a factor that cancels), U the upper Cholesky
factor of H⁻¹, B the block size.

Where this differs from the paper, and why:
- Grids are fitted before the first column and kept (static groups), so that columns may be taken in any order and the
  file needs no column index.
- Columns of least use go last, by the diagonal of H ("activation order", from the authors' code).
- A column that calibration never excites is cut loose from the others and rounded to nearest, not set to zero: it may
  be excited later.
- The clip search weighs each column by the loss that GPTQ pays for an error in it, 1 / U²ⱼⱼ, not evenly: where few
  columns carry large activations, clipping their weights for the others' sake costs most.
- U comes from one Cholesky factorisation of H taken from the last column to the first, H = R Rᵀ with R upper
  triangular, since then H⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹: no inverse of H and no second factorisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelzip.kernels.gptq_columns import gptq_columns
from modelzip.weights.affine import Affine

from .grid import AffineGrid


class SingularHessianError(ArithmeticError):
    """No damping on the ladder made the Hessian positive definite."""


@dataclass(frozen=True)
class InverseFactor:
    """U with H⁻¹ = UᵀU, [in, in] upper triangular, for the columns taken in `order` [in].

    damping: the share of H's mean diagonal that was added. dead: number of columns that calibration never excited.
    precision: "fp32", or "fp64" if fp32 failed at every damping.
    """

    upper: Tensor
    order: Tensor
    damping: float
    dead: int
    precision: str

    def importance(self) -> Tensor:
        """What an error in each column costs, [in] in the columns' own order: 1 / U²ⱼⱼ, the loss that GPTQ pays for it.

        Not the Hessian's diagonal: what the columns still to come can make up for costs nothing.
        """
        cost = torch.empty_like(self.upper[0])
        cost[self.order] = self.upper.diagonal() ** -2
        return cost


def inverse_factor(hessian: Tensor, *, damping: float, max_damping: float, order: str) -> InverseFactor:
    """Factorise the inverse of hessian [in, in]; one factor serves all linears that share an input.

    order: "activation" takes columns by falling diagonal, "none" as they stand. Damping rises by factors of √10 from
    `damping` to `max_damping`, first in fp32, then in fp64. Raises SingularHessianError at the end of the ladder.
    """
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal).all():
        raise SingularHessianError("the Hessian isn't finite: an activation overflowed")
    dead = diagonal <= 0
    permutation = diagonal.argsort(descending=True, stable=True)
    if order == "none":
        permutation = torch.arange(len(diagonal), device=hessian.device)
    backwards = permutation.flip(0)
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    steps = math.ceil(2 * math.log10(max(max_damping / damping, 1)) - 1e-9)
    rungs = [*(damping * 10 ** (step / 2) for step in range(steps)), max(damping, max_damping)]
    for precision in (torch.float32, torch.float64):
        for rung in rungs:
            damped = hessian.diagonal().to(precision) + rung * mean
            damped[dead] = mean
            upper = _upper(hessian, damped, backwards, precision)
            if upper is not None:
                name = "fp32" if precision == torch.float32 else "fp64"
                return InverseFactor(upper.to(hessian.dtype), permutation, rung, int(dead.sum()), name)
    raise SingularHessianError(f"not positive definite with damping up to {rungs[-1]:g} of the mean diagonal, in fp64")


def _upper(hessian: Tensor, diagonal: Tensor, backwards: Tensor, precision: torch.dtype) -> Tensor | None:
    """U with H⁻¹ = UᵀU for hessian [in, in] with this diagonal [in], or None if it isn't positive definite.

    backwards [in]: the columns, the last first. Wide Hessians are large: this works in two matrices, no more.
    """
    one = hessian.index_select(0, backwards).to(precision)
    two = one.index_select(1, backwards)
    two.diagonal().copy_(diagonal[backwards])
    info = torch.empty((), dtype=torch.int32, device=two.device)
    torch.linalg.cholesky_ex(two, out=(one.mT, info))  # laid out by columns, as LAPACK wants it
    if int(info) != 0:
        return None
    two.zero_().fill_diagonal_(1)
    torch.linalg.solve_triangular(one.mT, two, upper=False, out=two)
    if not all(torch.isfinite(edge) for edge in two.aminmax()):
        return None
    order = torch.arange(len(two) - 1, -1, -1, device=two.device)
    torch.index_select(two, 0, order, out=one)
    return torch.index_select(one, 1, order, out=two)


def gptq(weight: Tensor, factor: InverseFactor, grid: AffineGrid, *, block_size: int = 128) -> Affine:
    """Quantize weight [out, in] to the grid, minimising ‖(W − Ŵ)X‖² greedily over the columns.

    factor: of the damped Hessian of the inputs, from `inverse_factor`. block_size: columns brought up to date together.
    """
    rows, columns = weight.shape
    remaining = weight.T[factor.order].contiguous()
    codes = torch.empty_like(remaining, dtype=torch.int8)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        scale, zero_point = grid.columns(factor.order[start:stop], rows=rows, in_features=columns)
        quantized, errors = gptq_columns(
            remaining[start:stop],
            factor.upper[start:stop, start:stop],
            scale,
            zero_point,
            bits=grid.bits,
            value_dtype=grid.dtype,
        )
        codes[factor.order[start:stop]] = quantized
        remaining[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1)
    return grid.weight(codes.T)
