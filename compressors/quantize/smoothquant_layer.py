"""SmoothQuant as the engine sees it."""

from __future__ import annotations

from typing import Final

import torch

from modelzip.weights.dense import Dense
from modelzip.weights.float import Float
from modelzip.weights.int8 import Int8
from modelzip.weights.rounded_inputs import RoundedInputs
from modelzip.weights.value import CompressedWeight, dtype_name

from ..layer import LayerTask, Scales, ScaleTask, Scaling
from .activations import expected_rounding, rounding_of
from .float_grid import fit_float_grid
from .grid import fit_grid
from .settings_smoothquant import SmoothQuant
from .smoothquant import smooth_scales


def compress(task: LayerTask) -> CompressedWeight:
    """A matrix [out, in] whose columns have their scales already: rounded to nearest over each row's full range.

    Raises UnsuitableError if inputs have one scale and no token reaches them.
    """
    weight, inputs = task.weight, rounding_of(task)
    if inputs.number == "fp8":
        floats = fit_float_grid(weight, values="fp8-e4m3", group_size="channel", clip="none", dtype=task.dtype)
        return RoundedInputs(floats.weight(floats.nearest(weight)), inputs)
    grid = fit_grid(weight, bits=8, group_size=weight.shape[1], symmetric=True, clip="none", dtype=task.dtype)
    return Int8(grid.nearest(weight).to(torch.int8), grid.scale.to(task.dtype), inputs)


def expect(current: CompressedWeight, settings: SmoothQuant, dtype: torch.dtype) -> CompressedWeight | str:
    """Integers or floats instead of a plain matrix."""
    if not isinstance(current, Dense):
        return f"it is stored as {current.kind.replace('_', '-')} already"
    inputs = expected_rounding(settings, dtype)
    meta = {"shape": list(current.shape), "dtype": dtype_name(dtype)}
    if inputs.number == "int8":
        return Int8.empty({**meta, "inputs": inputs.meta()})
    floats = {"element": "e4m3", "scale": dtype_name(dtype), "strategy": "channel", "group_size": None}
    return RoundedInputs(Float.empty({**meta, **floats}), inputs)


def choose(task: ScaleTask) -> Scales:
    """Equation 4 for linears with one input."""
    settings: SmoothQuant = task.matrices[0][0]
    values = smooth_scales([weight for _, weight in task.matrices], task.largest, alpha=settings.alpha)
    return Scales(values, f"inputs smoothed with alpha {settings.alpha:g}")


SCALING: Final = Scaling(choose, frozenset({"norm", "product"}), needs_hessian=False)
