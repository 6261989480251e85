"""Inputs rounded to 8 bits, beside what a method makes of the weights: by token as they come, or with one scale.

Nagel et al. 2021, "A White Paper on Neural Network Quantization", sections 2.2 and 3.1: symmetric integers of 8 bits,
or the floats E4M3 of Micikevicius et al. 2022, "FP8 Formats for Deep Learning". A static scale is that of the largest
magnitude over the calibration tokens ("min-max"). Scales by token, as they come: Yao et al. 2022, "ZeroQuant: Efficient
and Affordable Post-Training Quantization for Large-Scale Transformers", section 4.2.

Weights are compressed for the inputs as they are; what a block hands on is computed with rounded ones, as the result
will compute it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from modelzip.weights.affine import Affine
from modelzip.weights.codebook import Codebook
from modelzip.weights.float import Float
from modelzip.weights.inputs import InputRounding, fixed_scale
from modelzip.weights.int8 import Int8
from modelzip.weights.rounded_inputs import RoundedInputs
from modelzip.weights.value import CompressedWeight, dtype_name

from ..layer import LayerMethod, LayerTask, UnsuitableError


def rounding_inputs(method: LayerMethod) -> LayerMethod:
    """The method, with inputs rounded where its settings (ActivationSettings) say so."""
    return replace(
        method,
        compress=partial(_compress, method),
        expect=partial(_expect, method),
        asks_for_largest=asks_for_largest,
    )


def asks_for_largest(settings: Any) -> bool:
    """Whether the scales of inputs are found on the calibration text."""
    return bool(settings.activations != "none" and settings.activation_scales == "static")


def rounding_of(task: LayerTask) -> InputRounding:
    """What becomes of a task's inputs. Raises UnsuitableError if nothing is known of them and must be."""
    settings = task.settings
    if not asks_for_largest(settings):
        return InputRounding(settings.activations)
    if task.largest is None:
        raise UnsuitableError("no calibration token reached it")
    return InputRounding(settings.activations, fixed_scale(settings.activations, task.largest, task.dtype))


def expected_rounding(settings: Any, dtype: torch.dtype) -> InputRounding:
    """The same on the meta device."""
    scale = dtype_name(dtype) if asks_for_largest(settings) else None
    return InputRounding.empty({"number": settings.activations, "scale": scale})


def with_inputs(weight: CompressedWeight, inputs: InputRounding) -> CompressedWeight | str:
    """The weight, multiplied with inputs that are rounded so, or a part of a sentence that says why it can't be.

    Integers of 8 bits with a scale to each row are multiplied as integers. Works on the meta device.
    """
    if isinstance(weight, Affine) and inputs.number == "int8" and _is_by_row(weight):
        is_meta = weight.packed.is_meta
        codes = torch.empty(weight.shape, dtype=torch.int8, device="meta") if is_meta else weight.codes()
        return Int8(codes, weight.scale, inputs)
    if isinstance(weight, Affine | Codebook | Float):
        return RoundedInputs(weight, inputs)
    kind = weight.kind.replace("_", "-")
    return f"its inputs can't be rounded, since it would be stored as {kind}: leave activations out"


def _is_by_row(weight: Affine) -> bool:
    return weight.bits == 8 and weight.zero_point is None and weight.strategy == "channel"


def _compress(method: LayerMethod, task: LayerTask) -> CompressedWeight:
    if task.settings.activations == "none":
        return method.compress(task)
    inputs = rounding_of(task)
    made = with_inputs(method.compress(task), inputs)
    assert not isinstance(made, str), "the plan has refused it"
    return made


def _expect(
    method: LayerMethod, current: CompressedWeight, settings: Any, dtype: torch.dtype
) -> CompressedWeight | str:
    made = method.expect(current, settings, dtype)
    if isinstance(made, str) or settings.activations == "none":
        return made
    return with_inputs(made, expected_rounding(settings, dtype))
