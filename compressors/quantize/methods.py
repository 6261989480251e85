"""The quantizers, each as the engine sees it: which statistic it needs, and two functions of plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.weights.affine import Affine

from .gptq import InverseFactor, gptq, inverse_factor
from .grid import AffineGrid, fit_grid
from .rtn import rtn
from .settings import Gptq, QuantizeSettings, Rtn


@dataclass(frozen=True)
class LayerMethod:
    """A method that compresses one matrix at a time.

    hessian: whether it needs the mean of x xᵀ over the calibration tokens, [in, in].
    prepare: what linears with the same input share, made from the Hessian once.
    compress: weight [out, in], what `prepare` gave, settings, dtype of the scales -> the compressed weight.
    note: what the report says of a preparation that isn't the ordinary one, or None.
    """

    hessian: bool
    prepare: Callable[[Tensor, Any], Any]
    compress: Callable[[Tensor, Any, Any, torch.dtype], Affine]
    note: Callable[[Any, Any], str | None]


def fitted_grid(
    weight: Tensor, settings: QuantizeSettings, dtype: torch.dtype, importance: Tensor | None = None
) -> AffineGrid:
    """The grid that the settings ask for; their group size must divide the columns. importance: of columns, [in]."""
    sizes = {"tensor": None, "channel": weight.shape[1]}
    size = settings.group_size
    return fit_grid(
        weight,
        bits=settings.bits,
        group_size=size if isinstance(size, int) else sizes[size],
        symmetric=settings.symmetric,
        clip=settings.clip,
        dtype=dtype,
        importance=importance,
    )


def _no_preparation(hessian: Tensor, settings: QuantizeSettings) -> None:
    return None


def _no_note(prepared: None, settings: QuantizeSettings) -> str | None:
    return None


def _rtn(weight: Tensor, prepared: None, settings: QuantizeSettings, dtype: torch.dtype) -> Affine:
    return rtn(weight, fitted_grid(weight, settings, dtype))


def _factor(hessian: Tensor, settings: Gptq) -> InverseFactor:
    return inverse_factor(hessian, damping=settings.damping, max_damping=settings.max_damping, order=settings.order)


def _gptq(weight: Tensor, prepared: InverseFactor, settings: Gptq, dtype: torch.dtype) -> Affine:
    grid = fitted_grid(weight, settings, dtype, prepared.importance())
    return gptq(weight, prepared, grid, block_size=settings.block_size)


def _gptq_note(prepared: InverseFactor, settings: Gptq) -> str | None:
    notes = []
    if prepared.damping > settings.damping or prepared.precision != "fp32":
        notes.append(f"the Hessian needed damping {prepared.damping:.3g} in {prepared.precision}")
    if prepared.dead:
        notes.append(f"{prepared.dead} input columns were never active and are rounded to nearest")
    return "; ".join(notes) or None


METHODS: Final[Mapping[type[QuantizeSettings], LayerMethod]] = MappingProxyType(
    {
        Rtn: LayerMethod(hessian=False, prepare=_no_preparation, compress=_rtn, note=_no_note),
        Gptq: LayerMethod(hessian=True, prepare=_factor, compress=_gptq, note=_gptq_note),
    }
)
