"""The errors that rounding to grids makes in each group of weights: what a search for the best grid asks for."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from . import cpu, reference


def rounding_errors(
    grouped: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, root: Tensor | None
) -> Tensor:
    """‖(w − ŵ) · root‖ for each grid and group of weights w, with ŵ the nearest values on that grid.

    grouped: fp32 [out, groups, size]. scale, and zero_point unless the grids are symmetric: [grids, out, groups].
    root: weight of each difference, [1, groups, size]; None for 1. Returns [grids, out, groups]. Raises ValueError on
    shapes that don't fit.
    """
    if scale.shape[1:] != grouped.shape[:2] or (zero_point is not None and zero_point.shape != scale.shape):
        raise ValueError(f"grids {tuple(scale.shape)} don't fit groups {tuple(grouped.shape)}")
    if root is not None and root.shape != (1, *grouped.shape[1:]):
        raise ValueError(f"root {tuple(root.shape)} doesn't fit groups {tuple(grouped.shape)}")
    given = [part for part in (grouped, scale, zero_point, root) if part is not None]
    run = cpu.rounding_errors if dispatch.path(*given) == "compiled" else reference.rounding_errors
    return run(grouped, scale, zero_point, bits=bits, root=root)
