"""The rounding errors in plain torch, in as few passes over the weights as it takes."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding_errors(
    grouped: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, root: Tensor | None
) -> Tensor:
    half = 1 << (bits - 1)
    norms = torch.empty_like(scale)
    levels = torch.empty_like(grouped)
    for grid, norm in enumerate(norms):
        step = scale[grid].unsqueeze(-1)
        torch.div(grouped, step, out=levels).round_()
        if zero_point is None:
            levels.clamp_(-half, half - 1)
        else:
            zero = zero_point[grid].unsqueeze(-1)
            levels.add_(zero).clamp_(-half, half - 1).sub_(zero)
        torch.addcmul(grouped, levels, step, value=-1, out=levels)
        torch.linalg.vector_norm(levels if root is None else levels.mul_(root), dim=-1, out=norm)
    return norms
