"""Round to nearest: the baseline of every weight quantizer."""

from __future__ import annotations

from torch import Tensor

from modelzip.weights.affine import Affine

from .grid import AffineGrid


def rtn(weight: Tensor, grid: AffineGrid) -> Affine:
    """Round each entry of weight [out, in] to the nearest point of its group's grid. Needs no data."""
    return grid.weight(grid.nearest(weight))
