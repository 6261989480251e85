"""QUIK as the engine sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from modelzip.weights.dense import Dense
from modelzip.weights.mixed_columns import ColumnRounding, MixedColumns
from modelzip.weights.value import CompressedWeight, dtype_name

from ..expected import grid_meta
from ..layer import LayerTask
from .quik import Split, quik, split
from .settings_quik import Quik


def prepare(hessian: Tensor, largest: Tensor, settings: Quik) -> Split:
    """What linears with the same input share. Raises SingularHessianError."""
    search = settings.model_dump(include={"damping", "max_damping", "order"})
    return split(hessian, largest, count=settings.count(len(hessian)), **search)


def note(prepared: Split, settings: Quik) -> str | None:
    """What the report says of an unusual Hessian."""
    return prepared.factor.note(settings.damping, "are rounded to nearest")


def compress(task: LayerTask) -> CompressedWeight:
    """One matrix."""
    settings: Quik = task.settings
    return quik(
        task.weight,
        task.prepared,
        bits=settings.bits,
        input_bits=settings.input_bits,
        clip=settings.clip,
        dtype=task.dtype,
        block_size=settings.block_size,
    )


def expect(current: CompressedWeight, settings: Quik, dtype: torch.dtype) -> CompressedWeight | str:
    """Integers and exact columns instead of a plain matrix."""
    if not isinstance(current, Dense):
        return f"it is stored as {current.kind.replace('_', '-')} already"
    rows, columns = current.shape
    count = settings.count(columns)
    grid = grid_meta(settings.bits, "channel", True, shape=(rows, columns - count))
    name = dtype_name(dtype)
    inner = {"shape": [rows, columns - count], "dtype": name, **grid}
    inputs = {"form": ColumnRounding.form, "bits": settings.input_bits, "count": count}
    return MixedColumns.empty({"shape": [rows, columns], "inner": inner, "inputs": inputs})
