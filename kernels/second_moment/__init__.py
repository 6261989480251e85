"""The symmetric rank-k update that gathers a Hessian."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .. import dispatch
from . import cpu, reference

PATHS: Final = {
    "reference": reference.add_second_moment,
    "compiled": cpu.add_second_moment,
    "compiled-bf16": cpu.add_pairs,
}


def add_second_moment(total: Tensor, rows: Tensor) -> None:
    """total += xᵀ x for rows x [tokens, in] of any floating type, each product and sum in fp32.

    total: fp32 [in, in], contiguous; what lies above its diagonal is of no use afterwards, since a symmetric matrix
    takes half the work. Raises ValueError on shapes that don't fit.
    """
    if total.shape != (rows.shape[-1],) * 2 or rows.dim() != 2:
        raise ValueError(f"rows {tuple(rows.shape)} don't fit a total of {tuple(total.shape)}")
    if total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(f"total must be contiguous fp32, not {total.dtype} with strides {total.stride()}")
    PATHS[dispatch.moment_path(total, rows)](total, rows)
