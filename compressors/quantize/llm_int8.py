"""LLM.int8(): products of 8-bit integers, but for the few input columns that hold large values.

Dettmers, Lewis, Belkada, Zettlemoyer 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale":
vector-wise quantization (section 3.1), a scale to each row of the weight and each token, the largest magnitude over
127; mixed-precision decomposition (section 3.2), found as the model runs: see `weights.inputs.OutlierRounding`.

Where this differs from the paper, and why:
- Columns of the weight that meet outliers are those of the stored integers, not of the 16-bit weights: a 16-bit copy of
  the matrix would double what is stored, since any column may be asked for. The authors' library does the same.
- That library takes single outliers, not their columns, out of a token's scale; this takes the columns, as the paper
  does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelzip.weights.dense import Dense
from modelzip.weights.inputs import OutlierRounding
from modelzip.weights.int8 import Int8
from modelzip.weights.value import CompressedWeight, dtype_name

from ..layer import LayerTask
from .settings_llm_int8 import LlmInt8

LARGEST = 127
"""Of the integers; -128 isn't taken."""


def by_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers int8 [out, in] and scales [out, 1] of `dtype` for weight [out, in]."""
    scale = (weight.abs().amax(1, keepdim=True) / LARGEST).to(dtype)
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def compress(task: LayerTask) -> CompressedWeight:
    """One matrix."""
    settings: LlmInt8 = task.settings
    return Int8(*by_rows(task.weight, task.dtype), OutlierRounding(settings.threshold))


def expect(current: CompressedWeight, settings: LlmInt8, dtype: torch.dtype) -> CompressedWeight | str:
    """Integers instead of a plain matrix."""
    if not isinstance(current, Dense):
        return f"it is stored as {current.kind.replace('_', '-')} already"
    inputs = OutlierRounding(settings.threshold).meta()
    return Int8.empty({"shape": list(current.shape), "dtype": dtype_name(dtype), "inputs": inputs})
