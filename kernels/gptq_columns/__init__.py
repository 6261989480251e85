"""The column loop of GPTQ inside one block of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from . import cpu, reference


def gptq_columns(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize the columns of one block in order, spreading each column's error over those still to come.

    All matrices are fp32 and transposed so that a column is contiguous. weight: [block, out], used up. factor:
    [block, block], upper triangular Cholesky factor of the inverse Hessian. scale, zero_point: [block, out], the grid
    of each column. Returns the signed codes, int8 [block, out], and the scaled errors [block, out] that the columns
    after this block must absorb: weight_after -= factor[block, after].T @ errors.
    Values are rounded to `value_dtype` (fp32, bf16 or fp16), the precision in which the runtime multiplies code and
    scale. Raises ValueError on shapes that don't fit.
    """
    if weight.shape != scale.shape or weight.shape != zero_point.shape:
        raise ValueError(f"weight {tuple(weight.shape)}, scale {tuple(scale.shape)}, zero point don't agree")
    if factor.shape != (weight.shape[0], weight.shape[0]):
        raise ValueError(f"factor {tuple(factor.shape)} doesn't fit a block of {weight.shape[0]} columns")
    run = cpu.gptq_columns if dispatch.path(weight, factor, scale, zero_point) == "compiled" else reference.gptq_columns
    return run(weight, factor, scale, zero_point, bits=bits, value_dtype=value_dtype)
