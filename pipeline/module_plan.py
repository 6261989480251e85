"""What is to become of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modelzip.checkpoints.blocks import Linear
from modelzip.compressors.layer import LayerMethod
from modelzip.compressors.methods import METHODS
from modelzip.compressors.settings import MethodSettings
from modelzip.weights.value import CompressedWeight


@dataclass(frozen=True)
class ModulePlan:
    """before, after: on the meta device. note: why its settings aren't the stage's. replaces: the checkpoint's tensors.

    linear: the module itself, also where it is an embedding's table (is_table), which lies outside the blocks.
    """

    name: str
    settings: MethodSettings
    before: CompressedWeight
    after: CompressedWeight
    note: str
    linear: Linear
    replaces: tuple[str, ...]
    is_table: bool = False

    @property
    def stem(self) -> str:
        """What stands before `weight` in its tensors' names."""
        return self.linear.tensor.removesuffix("weight")


def method_of(settings: MethodSettings) -> LayerMethod:
    """The method that these settings are of."""
    return METHODS[type(settings)]


def looks_at_inputs(settings: MethodSettings) -> bool:
    """Whether the method gathers anything of the inputs."""
    method = method_of(settings)
    return method.statistic != "none" or (method.asks_for_largest is not None and method.asks_for_largest(settings))


def unshared(plan: ModulePlan) -> str | None:
    """Why a matrix that serves several layers can't be compressed so, a part of a sentence; None if it can."""
    asks = method_of(plan.settings).asks_for_largest
    if plan.linear.sharers and asks is not None and asks(plan.settings):
        return "it serves several layers, whose inputs have ranges of their own"
    return None


def value_dtype(weight: CompressedWeight) -> torch.dtype:
    """The type in which values and scales made from this weight are stored: its own, fp32 for fp64."""
    found = (tensor.dtype for tensor in weight.tensors().values() if tensor.is_floating_point())
    dtype = next(found, weight.dtype)  # block floats have no floating tensor
    return torch.float32 if dtype == torch.float64 else dtype
