"""What a linear will be kept as: a group size that fits its columns, the expected form, and words for it."""

from __future__ import annotations

from typing import Final, TypeVar

import torch

from modelzip.compressors.layer import LayerMethod
from modelzip.compressors.settings import MethodSettings
from modelzip.weights.affine import Affine
from modelzip.weights.bilevel import Bilevel
from modelzip.weights.codebook import Codebook
from modelzip.weights.dense import Dense
from modelzip.weights.float import BYTE_SCALES, Float
from modelzip.weights.inputs import IntegerInputs, OutlierRounding
from modelzip.weights.int8 import Int8
from modelzip.weights.kronecker import Kronecker
from modelzip.weights.low_rank import Factor, LowRank
from modelzip.weights.mixed_columns import MixedColumns
from modelzip.weights.rounded_inputs import RoundedInputs
from modelzip.weights.sparse import Sparse
from modelzip.weights.tensor_train import TensorTrain
from modelzip.weights.value import CompressedWeight
from modelzip.weights.vector_codebook import VectorCodebook
from modelzip.weights.with_outliers import WithOutliers

SMALLEST_GROUP: Final = 16
"""Group sizes that replace one that doesn't divide are powers of two from here up: the ones that engines take."""

Settings = TypeVar("Settings", bound=MethodSettings)


def fitted(settings: Settings, shape: tuple[int, int]) -> tuple[Settings, str]:
    """The settings with a group size that divides the columns of a matrix [out, in], or its rows if groups lie along
    them, and what was changed; those without bits stay."""
    count, along = grouped(settings, shape)
    size = getattr(settings, "group_size", None)
    has_groups = getattr(settings, "bits", None) is not None
    if not has_groups or not isinstance(size, int) or count % size == 0:
        return settings, ""
    fitting = [
        1 << power for power in range(4, 16) if SMALLEST_GROUP <= 1 << power < size and count % (1 << power) == 0
    ]
    chosen: int | str = max(fitting) if fitting else "channel"
    return settings.model_copy(update={"group_size": chosen}), f"group {size} doesn't divide {count} {along}"


def grouped(settings: MethodSettings, shape: tuple[int, int]) -> tuple[int, str]:
    """How many of what the groups of a matrix [out, in] divide: rows or columns."""
    along = getattr(settings, "group_along", "columns")
    return (shape[0] if along == "rows" else shape[1]), along


def taken_group(settings: MethodSettings) -> str:
    """The group size in words."""
    size = getattr(settings, "group_size", None)
    if isinstance(size, int):
        return f"group {size}"
    return "one scale a column" if getattr(settings, "group_along", "columns") == "rows" else "one scale a row"


def expected(
    method: LayerMethod, before: CompressedWeight, settings: MethodSettings, dtype: torch.dtype
) -> CompressedWeight | str:
    """What a weight will become, on the meta device, or a part of a sentence that says why the method can't take it.

    A product of two factors is compressed factor by factor.
    """
    if not isinstance(before, LowRank):
        return method.expect(before, settings, dtype)
    factors: list[Factor] = []
    for factor in (before.left, before.right):
        made = method.expect(factor, fitted(settings, factor.shape)[0], dtype)
        if not isinstance(made, Factor):
            return made if isinstance(made, str) else f"its factors can't become {made.kind.replace('_', '-')}"
        factors.append(made)
    left, right = factors
    return LowRank(left, right)


def described(weight: CompressedWeight) -> str:
    """A few words for the plan and the report, such as `4 bit, group 64` or `2:4`."""
    match weight:
        case Affine():
            return f"{weight.bits} bit, {_shared(weight)}"
        case Float():
            scales = f" {weight.scale_kind}" if weight.scale_kind in BYTE_SCALES else ""
            return f"{weight.element.bits} bit {weight.element.name}, {_shared(weight)}{scales}"
        case Int8():
            return f"8 bit, one scale a row, {_inputs(weight.inputs)}"
        case MixedColumns():
            columns = 100 * weight.exact.shape[1] / weight.shape[1]
            return f"{described(weight.inner)}, {columns:.3g} % of columns exact, inputs of {weight.inputs.bits} bit"
        case RoundedInputs():
            return f"{described(weight.inner)}, {_inputs(weight.inputs)}"
        case Codebook():
            offsets = "" if weight.offset is None else " with offsets"
            shared = () if weight.scale is None else (f"{_tile(weight)}{offsets}",)
            tables = "evenly" if offsets else "a table a row" if len(weight.table) > 1 else "one table"
            return ", ".join([f"{weight.bits} bit", tables, *shared])
        case VectorCodebook():
            return _vectors(weight)
        case Sparse():
            kept = weight.count / (weight.shape[0] * weight.shape[1])
            share = "{}:{}".format(*weight.pattern) if weight.pattern else f"{100 * (1 - kept):.3g} % zeros"
            return share if weight.scales is None else f"{share}, {weight.scales.bits} bit"
        case Bilevel():
            return f"{weight.bits} bit, group {weight.group_size}, scales of {weight.scale.bits} bit"
        case WithOutliers():
            exact = 100 * weight.count / (weight.shape[0] * weight.shape[1])
            return f"{described(weight.inner)}, {exact:.3g} % outliers"
        case LowRank():
            factors = {described(factor) for factor in (weight.left, weight.right)} - {"dense"}
            return ", ".join([f"rank {weight.left.shape[1]}", *sorted(factors)])
        case Kronecker():
            terms, *first = weight.a.shape
            return f"{terms} × ({first[0]}×{first[1]} ⊗ {weight.b.shape[1]}×{weight.b.shape[2]})"
        case TensorTrain():
            return f"{len(weight.cores)} cores, rank {max(core.shape[-1] for core in weight.cores)}"
        case Dense():
            return "dense"
    raise AssertionError(f"a kind without words: {weight.kind}")


def _inputs(inputs: IntegerInputs) -> str:
    """Such as `inputs of 8 bit`, `inputs of fp8 by one scale`."""
    number = "8 bit" if inputs.number == "int8" else inputs.number
    if isinstance(inputs, OutlierRounding):
        return f"inputs of {number}, columns exact from {inputs.threshold:g}"
    return f"inputs of {number}" if inputs.scale is None else f"inputs of {number} by one scale"


def _vectors(weight: VectorCodebook) -> str:
    """Such as `2 bit, vectors of 4`, `2 bit, 2 codebooks of vectors of 8, int8, group 64`."""
    rate = weight.bits * weight.books / weight.dim
    vectors = f"vectors of {weight.dim}"
    parts = [f"{rate:.3g} bit", vectors if weight.books == 1 else f"{weight.books} codebooks of {vectors}"]
    if weight.sections > 1:
        parts.append(f"{weight.sections} sections")
    if weight.vectors.entry_scale is not None:
        parts.append("int8 entries")
    if weight.group_size is not None and weight.group_size < weight.shape[1]:
        parts.append(f"group {weight.group_size}")
    return ", ".join([*parts, *(["rotated"] if weight.vectors.rotation is not None else [])])


def _shared(weight: Affine | Float) -> str:
    return f"group {weight.group_size}" if weight.strategy == "group" else f"one scale a {_ROWS[weight.strategy]}"


def _tile(weight: Codebook) -> str:
    rows, columns = weight.group_rows, weight.group_size
    if rows > 1:
        return "one scale a column" if rows == weight.shape[0] else f"group {rows} along the rows"
    return "one scale a row" if columns == weight.shape[1] else f"group {columns}"


_ROWS = {"channel": "row", "tensor": "matrix"}
