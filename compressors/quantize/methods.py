"""The quantizers, each as the engine sees it: which statistic it needs, and a few functions of plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.weights.affine import Affine
from modelzip.weights.dense import Dense
from modelzip.weights.low_rank import LowRank
from modelzip.weights.sparse import Sparse
from modelzip.weights.value import CompressedWeight, dtype_name

from ..expected import grid_meta, group_misfit
from ..layer import LayerMethod, LayerTask
from ..masks import pattern_of
from ..obs import InverseFactor, inverse_factor
from ..settings import MethodSettings
from .gptq import gptq
from .grid import AffineGrid, chosen_grid
from .rtn import rtn
from .settings import Gptq, QuantizeSettings, Rtn


def _rtn(task: LayerTask) -> CompressedWeight:
    return _stored(task, rtn(task.weight, _grid(task)))


def _factor(hessian: Tensor, settings: Gptq) -> InverseFactor:
    return inverse_factor(hessian, damping=settings.damping, max_damping=settings.max_damping, order=settings.order)


def _gptq(task: LayerTask) -> CompressedWeight:
    grid = _grid(task, task.prepared.importance())
    return _stored(task, gptq(task.weight, task.prepared, grid, block_size=task.settings.block_size, kept=task.kept))


def _gptq_note(prepared: InverseFactor, settings: Gptq) -> str | None:
    return prepared.note(settings.damping, "are rounded to nearest")


def _grid(task: LayerTask, importance: Tensor | None = None) -> AffineGrid:
    """Zeros lie on every grid: entries that are lost already have no say in it."""
    weight = task.weight if task.kept is None else task.weight.masked_fill(~task.kept, 0)
    return chosen_grid(weight, task.settings, bits=task.settings.bits, dtype=task.dtype, importance=importance)


def _stored(task: LayerTask, affine: Affine) -> CompressedWeight:
    """What was pruned before stays pruned."""
    return affine if task.kept is None else Sparse.of_affine(affine, task.kept, pattern=pattern_of(task.kept))


def _expect(current: CompressedWeight, settings: QuantizeSettings, dtype: torch.dtype) -> CompressedWeight | str:
    """Codes instead of a plain matrix, of what is left of a sparse one, of each plain factor of a low-rank one."""
    if isinstance(current, LowRank):
        sides = [_expect(side, settings, dtype) for side in (current.left, current.right)]
        wrong = next((side for side in sides if isinstance(side, str)), None)
        if wrong is not None:
            return f"of a factor, {wrong}"
        left, right = sides
        assert isinstance(left, Affine | Sparse)
        assert isinstance(right, Affine | Sparse)
        return LowRank(left, right)
    if not isinstance(current, Dense | Sparse) or (isinstance(current, Sparse) and current.scales is not None):
        told = "quantized" if isinstance(current, Affine | Sparse) else f"stored as {current.kind.replace('_', '-')}"
        return f"it is {told} already"
    misfit = group_misfit(settings.group_size, current.shape[1])
    if misfit:
        return misfit
    grid = grid_meta(settings.bits, settings.group_size, settings.symmetric, shape=current.shape)
    meta: dict[str, Any] = {"shape": list(current.shape), "dtype": dtype_name(dtype), **grid}
    if isinstance(current, Sparse):
        return Sparse.empty({**meta, "pattern": current.pattern, "nnz": current.count})
    return Affine.empty(meta)


def _plainer(settings: QuantizeSettings) -> Rtn:
    return Rtn(**settings.model_dump(include=set(Rtn.model_fields) - {"method"}))


METHODS: Final[Mapping[type[MethodSettings], LayerMethod]] = MappingProxyType(
    {
        Rtn: LayerMethod(compress=_rtn, expect=_expect),
        Gptq: LayerMethod(compress=_gptq, expect=_expect, statistic="hessian", prepare=_factor, note=_gptq_note),
    }
)

FALLBACK: Final[Mapping[type[MethodSettings], Callable[[Any], MethodSettings]]] = MappingProxyType({Gptq: _plainer})
"""What is done instead of a method where it doesn't serve: settings -> plainer settings."""
