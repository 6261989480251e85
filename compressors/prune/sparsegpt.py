from __future__ import annotations

import torch
from torch import Tensor

from ..masks import Pattern
from ..obs import InverseFactor, surgery
from ..quantize.grid import AffineGrid


def sparsegpt(
    weight: Tensor,
    factor: InverseFactor,
    sparsity: float | Pattern,
    *,
    dtype: torch.dtype,
    grid: AffineGrid | None = None,
    kept: Tensor | None = None,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    if isinstance(sparsity, tuple):
        written, left = surgery(weight, factor, value_dtype=dtype, block_size=block_size, grid=grid, kept=kept, pattern=sparsity)
    else:
        sizes = quotas(weight, factor.order, sparsity, kept=kept, block_size=block_size)
        written, left = surgery(weight, factor, value_dtype=dtype, block_size=block_size, grid=grid, kept=kept, quotas=sizes)
    assert left is not None
    return written, left


def quotas(weight: Tensor, order: Tensor, sparsity: float, *, kept: Tensor | None, block_size: int) -> list[int]:
    rows, columns = weight.shape
    held = torch.full((columns,), rows) if kept is None else kept.sum(0)[order].cpu()
    bounds = [*range(block_size, columns, block_size), columns]
    reached = [int(held[:bound].sum()) for bound in bounds]
    further = max(0, round(sparsity * weight.numel()) - (weight.numel() - reached[-1])) / max(1, reached[-1])
    lost = [rows * bound - count + round(further * count) for bound, count in zip(bounds, reached, strict=True)]
    return [after - before for before, after in zip([0, *lost[:-1]], lost, strict=True)]
