"""A linear in fp32 between activations in fewer bits: what a CPU without units for bf16 is fastest at."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from . import cpu, reference


def mixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, each product and sum in fp32, the result rounded once, to x's type.

    x: [..., in] of any floating type. weight: fp32 [out, in], in any strides. bias: fp32 [out]. Returns [..., out].
    Raises ValueError on shapes or types that don't fit.
    """
    if weight.shape[1:] != x.shape[-1:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"inputs {tuple(x.shape)} and bias don't fit a weight of {tuple(weight.shape)}")
    if any(part is not None and part.dtype != torch.float32 for part in (weight, bias)):
        raise ValueError("weight and bias must be fp32")
    given = [part for part in (x, weight, bias) if part is not None]
    run = cpu.mixed_linear if dispatch.product_path(*given) == "compiled" else reference.mixed_linear
    return run(x, weight, bias)
