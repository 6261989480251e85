"""SparseGPT: prune a matrix column by column, spreading what each column loses over the columns still to come.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", algorithm 1. W is
the weight, H the Hessian XXᵀ + λI, U the upper Cholesky factor of H⁻¹, B the block size, of columns whose masks are
chosen together. An entry costs w² / U²ⱼⱼ.

Where this differs from the paper, and why:
- Columns of little use go first: what is lost in them the columns of much use, still to come, can make up for. The
  entries of a share are the cheapest of all columns still to come, not the same share of each block, which would take
  as much from the most used columns as from the least. On layers of SmolLM2-135M at 50 % that lowers the relative error
  of the outputs from 0.112 to 0.101 on the calibration text, and from 0.141 to 0.139 on another.
  `threshold="block"` and `order="none"` are the paper's.
- For n:m, where each group loses the same share, groups of m columns are taken by falling use, as GPTQ takes columns
  (0.155 and 0.151). A group's columns stay together and in their order, since n:m is of neighbours. With a grid, whose
  errors fall on all columns alike, columns go by falling use too (0.117 rising, 0.112 falling).
- Values are rounded to their storage type inside the loop, so that this error is made up for too.
- A column that calibration never excites isn't set to zero as a whole: its entries compete as if its inputs were of
  mean size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import Pattern, largest_of_groups, without_smallest_of_all
from ..obs import InverseFactor, surgery
from ..quantize.grid import AffineGrid


def sparsegpt(
    weight: Tensor,
    factor: InverseFactor,
    sparsity: float | Pattern,
    *,
    value_dtype: torch.dtype,
    grid: AffineGrid | None = None,
    kept: Tensor | None = None,
    threshold: str = "matrix",
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune weight [out, in], minimising ‖(W − Ŵ)X‖² greedily over the columns.

    factor: of the damped Hessian, from `inverse_factor`; for a pattern with its m columns `together`. sparsity: the
    share of all entries that become zero, or a pattern (n, m). grid: of the entries that are kept, None to keep values,
    in value_dtype. kept: bool [out, in], False where entries are zero already; they stay zero and count. threshold:
    "matrix" takes the cheapest entries of all columns still to come, "block" the same share of each block. block_size:
    columns whose entries are chosen together, a multiple of m.

    Returns the signed codes or the values, and which entries were kept, both [out, in].
    """
    quotas: list[int] | int | None = None
    if not isinstance(sparsity, tuple):
        quotas = _quotas(weight, factor.order, sparsity, kept=kept, block_size=block_size)
        quotas = sum(quotas) if threshold == "matrix" else quotas
    written, left = surgery(
        weight,
        factor,
        value_dtype=value_dtype,
        block_size=block_size,
        grid=grid,
        kept=kept,
        quotas=quotas,
        pattern=sparsity if isinstance(sparsity, tuple) else None,
    )
    assert left is not None
    return written, left


def foreseen(weight: Tensor, factor: InverseFactor, sparsity: float | Pattern, kept: Tensor | None) -> Tensor:
    """bool [out, in]: what would be kept if no entry changed on the way. Grids are fitted to these."""
    costs = weight.square() * factor.importance()
    if isinstance(sparsity, tuple):
        return largest_of_groups(costs, sparsity, kept)
    return without_smallest_of_all(costs, round(sparsity * weight.numel()), kept)


def _quotas(weight: Tensor, order: Tensor, sparsity: float, *, kept: Tensor | None, block_size: int) -> list[int]:
    """How many entries of each block are zero in the end: those that are already, and the same share of the others."""
    rows, columns = weight.shape
    held = torch.full((columns,), rows) if kept is None else kept.sum(0)[order].cpu()
    bounds = [*range(block_size, columns, block_size), columns]
    reached = [int(held[:bound].sum()) for bound in bounds]
    already = weight.numel() - reached[-1]
    further = max(0, round(sparsity * weight.numel()) - already) / max(1, reached[-1])
    lost = [rows * bound - count + round(further * count) for bound, count in zip(bounds, reached, strict=True)]
    return [after - before for before, after in zip([0, *lost[:-1]], lost, strict=True)]
