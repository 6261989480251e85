"""Round to nearest: the baseline of every weight quantizer."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from modelzip.weights.value import CompressedWeight

from .grid import AnyGrid

Made = TypeVar("Made", bound=CompressedWeight)


def rtn(weight: Tensor, grid: AnyGrid[Made]) -> Made:
    """Round each entry of weight [out, in] to the nearest value of the grid. Needs no data."""
    return grid.weight(grid.nearest(weight))
