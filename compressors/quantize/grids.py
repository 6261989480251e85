"""The grid that the settings of a method name: fitted to one matrix, and what it will make of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modelzip.weights.affine import Affine
from modelzip.weights.codebook import Codebook
from modelzip.weights.float import Float
from modelzip.weights.value import CompressedWeight, dtype_name

from ..expected import grid_meta, group_misfit
from ..layer import LayerTask
from .float_grid import BYTE_SCALES, ELEMENTS, FloatGrid, fit_float_grid
from .grid import AffineGrid, chosen_grid
from .settings import Hqq, OnGrid, QuantizeSettings
from .settings_grids import BLOCKS
from .table_grid import TableGrid, by_group, fit_table_grid, stored_scales
from .ternary import TernaryGrid, ternary_scales


def grid_of(task: LayerTask, importance: Tensor | None = None) -> AffineGrid | FloatGrid | TableGrid | TernaryGrid:
    """The grid for the task's matrix. importance: what an error in each column costs, [in].

    Zeros lie on every grid of integers: entries that are lost already have no say in it.
    """
    settings, weight, dtype = task.settings, task.weight, task.dtype
    if settings.grid == "int":
        weight = weight if task.kept is None else weight.masked_fill(~task.kept, 0)
        return chosen_grid(weight, settings, bits=settings.bits, dtype=dtype, importance=importance)
    common = {"group_size": settings.group_size, "clip": settings.clip, "dtype": dtype, "importance": importance}
    if settings.grid in ELEMENTS:
        return fit_float_grid(weight, values=settings.grid, largest=task.surveyed, **common)
    if settings.grid == "ternary":
        size = weight.shape[1] if settings.group_size == "channel" else int(settings.group_size)
        return TernaryGrid(stored_scales(by_group(weight, size, ternary_scales, importance=importance), dtype), dtype)
    return fit_table_grid(weight, values=settings.grid, bits=settings.bits, **common)


def grid_misfit(settings: QuantizeSettings, shape: tuple[int, int]) -> str | None:
    """Why the grid doesn't fit a matrix [out, in], a part of a sentence; None if it does."""
    rows, columns = shape
    if isinstance(settings, Hqq) and settings.group_along == "rows":
        return group_misfit(settings.group_size, rows, "rows")
    block = BLOCKS.get(settings.grid) if isinstance(settings, OnGrid) else None
    if block is not None and columns % block:
        return f"{columns} columns aren't whole blocks of {block}, as {settings.method} on such a grid needs"
    return group_misfit(settings.group_size, columns)


def expected_on_grid(settings: QuantizeSettings, dtype: torch.dtype, shape: tuple[int, int]) -> CompressedWeight:
    """What a plain matrix [out, in] will become on any grid but `int`, on the meta device."""
    grid, size = getattr(settings, "grid", None), settings.group_size
    meta: dict[str, Any] = {"shape": list(shape), "dtype": dtype_name(dtype)}
    if grid in ELEMENTS:
        scale = BYTE_SCALES.get(str(grid), dtype_name(dtype))
        shared = grid_meta(settings.bits, size, True, shape=shape)
        if grid in BYTE_SCALES:
            shared |= {"strategy": "group", "group_size": size}
        computed = "bfloat16" if scale == "e4m3" else meta["dtype"]
        return Float.empty({**meta, **shared, "element": ELEMENTS[str(grid)].name, "scale": scale, "dtype": computed})
    if grid == "ternary":
        return Affine.empty({**meta, **grid_meta(settings.bits, size, True, shape=shape)})
    own = grid == "kmeans"
    height, width = settings.tile(shape) if isinstance(settings, Hqq) else (1, shape[1] if size == "channel" else size)
    tables = {
        "bits": settings.bits,
        "tables": shape[0] if own and size == "channel" else 1,
        "table_dtype": meta["dtype"] if own else "float32",
        "group_size": None if own else width,
        "group_rows": height,
        "scale_dtype": None if own else meta["dtype"],
        "offset": isinstance(settings, Hqq),
    }
    return Codebook.empty({**meta, **tables})


def has_common_scale(settings: OnGrid) -> bool:
    """Whether a scale is common to all matrices of these settings."""
    return settings.grid == "nvfp4"


def largest_of_all(matrices: Iterator[tuple[Any, Tensor]]) -> float | None:
    """The largest magnitude of all weights that have a scale in common, None without any."""
    return max((float(weight.abs().amax()) for _, weight in matrices), default=None)
