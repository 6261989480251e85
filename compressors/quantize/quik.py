"""QUIK: GPTQ with the columns last that meet the largest inputs, which stay exact and take up all that rounding loses.

Ashkboos, Markov, Frantar, Zhong, Wang, Ren, Hoefler, Alistarh 2023, "QUIK: Towards End-to-End 4-Bit Inference on
Generative Large Language Models", section 3: outlier columns are those of the largest l∞ norm of the calibration
inputs; their weights come last in GPTQ, so that errors of all others flow into them; the others are symmetric integers,
a scale to each row; inputs of the others are asymmetric integers, a scale and a zero point to each token.

W is the weight, H the Hessian of its inputs, U the upper Cholesky factor of H⁻¹ with the r columns to be rounded before
the others, o. GPTQ on the r columns needs U_rr alone; what it then adds to the exact ones is −(W_r − Ŵ_r) U_rr⁻¹ U_ro.

Where this differs from the paper, and why:
- Columns to be rounded are taken by falling diagonal of H, as `gptq` takes them; the authors' code takes them by rising
  largest input.
- The number of exact columns is a share of each matrix's, 256 of 4096 by default: the authors' code has the same with
  an option, since wider inputs have more outliers. It is not set to zero where no input is large.
- 8 bits for down projections, which the paper advises for gated feed-forwards, are said by a rule for their names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modelzip.weights.mixed_columns import ColumnRounding, MixedColumns

from ..obs import InverseFactor, inverse_factor
from .gptq import gptq
from .grid import fit_grid


@dataclass(frozen=True)
class Split:
    """What linears with one input share.

    columns: that stay exact, int64 [count], rising. others: all the rest, int64, rising. factor: of the inverse
    Hessian for these, before the exact ones. spread: [others, count], how an error in each goes to the exact columns.
    """

    columns: Tensor
    others: Tensor
    factor: InverseFactor
    spread: Tensor


def split(hessian: Tensor, largest: Tensor, *, count: int, damping: float, max_damping: float, order: str) -> Split:
    """Choose the `count` columns of largest magnitude, largest [in], and factorise hessian [in, in] with them last.

    order: of the others, as in `inverse_factor`. Raises SingularHessianError.
    """
    columns = largest.argsort(descending=True, stable=True)[:count].sort().values
    whole = inverse_factor(hessian, damping=damping, max_damping=max_damping, order=order, last=columns)
    kept = len(hessian) - count
    upper = whole.upper[:kept, :kept].contiguous()
    is_other = torch.ones(len(hessian), dtype=torch.bool, device=hessian.device).index_fill_(0, columns, False)
    others = is_other.nonzero().flatten()
    place = torch.searchsorted(others, whole.order[:kept])
    spread = torch.empty_like(whole.upper[:kept, kept:])
    spread[place] = torch.linalg.solve_triangular(upper, whole.upper[:kept, kept:], upper=True)
    return Split(columns, others, replace(whole, upper=upper, order=place), spread)


def quik(
    weight: Tensor,
    parts: Split,
    *,
    bits: int,
    input_bits: int,
    clip: str,
    dtype: torch.dtype,
    block_size: int = 128,
) -> MixedColumns:
    """Quantize weight [out, in] but for the exact columns. bits, input_bits: of one weight, and of one input.

    clip: of each row's range, as in `fit_grid`. dtype: of scales and exact columns.
    """
    rest = weight[:, parts.others].contiguous()
    grid = fit_grid(
        rest,
        bits=bits,
        group_size=rest.shape[1],
        symmetric=True,
        clip=clip,
        dtype=dtype,
        importance=parts.factor.importance(),
    )
    inner = gptq(rest, parts.factor, grid, block_size=block_size)
    exact = weight[:, parts.columns] - (rest - inner.dense(torch.float32)) @ parts.spread
    return MixedColumns(inner, exact.to(dtype), ColumnRounding(input_bits, parts.columns.to(torch.int32)))
