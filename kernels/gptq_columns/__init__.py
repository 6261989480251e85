"""The column loop of GPTQ inside one block of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def gptq_columns(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block in order, spreading each column's error over those still to come.

    All matrices are transposed so that a column is contiguous. weight: [block, out], overwritten. factor:
    [block, block], upper triangular Cholesky factor of the inverse Hessian. scale, zero_point: [block, out], the grid
    of each column. Returns the signed codes (as floats) [block, out] and the scaled errors [block, out] that the
    columns after this block must absorb: weight_after -= factor[block, after].T @ errors.
    Values are rounded to `value_dtype`, the precision in which the runtime multiplies code and scale.
    """
    if weight.shape != scale.shape or weight.shape != zero_point.shape:
        raise ValueError(f"weight {tuple(weight.shape)}, scale {tuple(scale.shape)}, zero point don't agree")
    if factor.shape != (weight.shape[0], weight.shape[0]):
        raise ValueError(f"factor {tuple(factor.shape)} doesn't fit a block of {weight.shape[0]} columns")
    return reference.gptq_columns(weight, factor, scale, zero_point, bits=bits, value_dtype=value_dtype)
