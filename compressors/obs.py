"""The optimal brain surgeon, column by column: what GPTQ and SparseGPT share.

Hassibi & Stork 1992, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", taken in one order of the
columns for all rows (Frantar & Alistarh 2023, "SparseGPT", section 3.2): W is the weight, H the Hessian 2XXᵀ (up to a
factor that cancels), U the upper Cholesky factor of H⁻¹. Changing w_j by δ costs δ² / U²ⱼⱼ when the columns after it
make up for it as well as they can.

Where this differs from the papers, and why:
- A column that calibration never excites is cut loose from the others and gets the mean diagonal: it may be excited
  later.
- U comes from one Cholesky factorisation of H taken from the last column to the first, H = R Rᵀ with R upper
  triangular, since then H⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹: no inverse of H and no second factorisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelzip.kernels.obs_columns import obs_columns
from modelzip.weights.value import CompressedWeight

from .damping import ladder
from .layer import UnsuitableError
from .masks import Pattern, without_smallest_of_all
from .quantize.grid import AnyGrid


class SingularHessianError(UnsuitableError):
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
        """What an error in each column costs, [in] in the columns' own order: 1 / U²ⱼⱼ, the loss that is paid for it.

        Not the Hessian's diagonal: what the columns still to come can make up for costs nothing.
        """
        cost = torch.empty_like(self.upper[0])
        cost[self.order] = self.upper.diagonal() ** -2
        return cost

    def inverse(self) -> Tensor:
        """H⁻¹ [in, in], the columns in their own order."""
        inverse = torch.empty_like(self.upper)
        inverse[self.order.unsqueeze(1), self.order] = self.upper.T @ self.upper
        return inverse

    def note(self, damping: float, fate: str) -> str | None:
        """What the report says if more than `damping` was needed, or of dead columns, whose `fate` ends a sentence."""
        notes = []
        if self.damping > damping or self.precision != "fp32":
            notes.append(f"the Hessian needed damping {self.damping:.3g} in {self.precision}")
        if self.dead:
            notes.append(f"{self.dead} input columns were never active and {fate}")
        return "; ".join(notes) or None


def require_finite(hessian: Tensor) -> None:
    """Raise SingularHessianError for a Hessian [in, in] of activations that aren't finite."""
    if not torch.isfinite(hessian.diagonal()).all():
        raise SingularHessianError("the Hessian isn't finite: an activation overflowed")


def inverse_factor(
    hessian: Tensor,
    *,
    damping: float,
    max_damping: float,
    order: str,
    together: int = 1,
    last: Tensor | None = None,
) -> InverseFactor:
    """Factorise the inverse of hessian [in, in]; one factor serves all linears that share an input.

    order: "activation" takes columns by falling diagonal, "rising" by rising diagonal, "none" as they stand. together:
    so many columns in a row stay together, ordered by the sum of their diagonal; must divide the columns. last: columns
    that come after all others, int64 [count], in this order. Damping rises by factors of √10 from `damping` to
    `max_damping`, first in fp32, then in fp64. Raises SingularHessianError at the end of the ladder.
    """
    require_finite(hessian)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    permutation = torch.arange(len(diagonal), device=hessian.device).reshape(-1, together)
    if order != "none":
        use = diagonal.reshape(-1, together).sum(1)
        permutation = permutation[use.argsort(descending=order == "activation", stable=True)]
    permutation = permutation.reshape(-1)
    if last is not None:
        permutation = torch.cat([permutation[~torch.isin(permutation, last)], last])
    backwards = permutation.flip(0)
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    rungs = ladder(damping, max_damping)
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


def surgery(
    weight: Tensor,
    factor: InverseFactor,
    *,
    value_dtype: torch.dtype,
    block_size: int,
    grid: AnyGrid[CompressedWeight] | None = None,
    kept: Tensor | None = None,
    quotas: Sequence[int] | int | None = None,
    pattern: Pattern | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Round or zero weight [out, in] in the factor's order, each column's error spread over the columns still to come.

    Entries outside kept (bool [out, in]) become zero. With quotas so do more of them, until there are so many, those
    outside kept counted in: a number for each block of `block_size` columns, or one number for the matrix. They are the
    ones of least cost as they stand when a block is reached: of the block, or of all columns still to come. With a
    pattern, all but n of each m columns in a row become zero; m must divide block_size. What is left goes to its
    nearest value on the grid, or keeps its own in `value_dtype`.

    Returns signed codes, indices into a table, or values, [out, in], and what was kept; None if that is all.
    """
    rows, columns = weight.shape
    remaining = weight.T[factor.order].contiguous()
    written: Tensor | None = None
    given = None if kept is None else kept.T[factor.order]
    everything = given is None and quotas is None and pattern is None
    left = None if everything else torch.empty_like(remaining, dtype=torch.bool)
    lost = 0
    for number, start in enumerate(range(0, columns, block_size)):
        block = slice(start, min(start + block_size, columns))
        mask = None if given is None else given[block]
        if quotas is not None:
            reach = slice(start, columns) if isinstance(quotas, int) else block
            costs = (remaining[reach] / factor.upper.diagonal()[reach, None]).square_()
            quota = quotas - lost if isinstance(quotas, int) else quotas[number]
            mask = without_smallest_of_all(costs, quota, None if given is None else given[reach])[: block.stop - start]
            lost += mask.numel() - int(mask.count_nonzero())
        points = None
        if grid is not None:
            points = grid.columns(factor.order[block], rows=rows, in_features=columns)
        upper = factor.upper[block, block]
        done = obs_columns(remaining[block], upper, grid=points, kept=mask, pattern=pattern, value_dtype=value_dtype)
        if written is None:
            written = torch.empty_like(remaining, dtype=done.written.dtype)
        written[factor.order[block]] = done.written
        if left is not None and done.kept is not None:
            left[factor.order[block]] = done.kept
        remaining[block.stop :].addmm_(factor.upper[block, block.stop :].T, done.errors, alpha=-1)
    assert written is not None
    return written.T, None if left is None else left.T
