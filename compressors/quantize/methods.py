"""The quantizers, each as the engine sees it: which statistic it needs, and a few functions of plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.weights.affine import Affine
from modelzip.weights.bilevel import Bilevel
from modelzip.weights.codebook import Codebook
from modelzip.weights.dense import Dense
from modelzip.weights.float import Float
from modelzip.weights.low_rank import Factor, LowRank
from modelzip.weights.sparse import Sparse
from modelzip.weights.value import CompressedWeight, dtype_name
from modelzip.weights.vector_codebook import VectorCodebook
from modelzip.weights.with_outliers import WithOutliers

from ..expected import grid_meta
from ..layer import LayerMethod, LayerTask
from ..masks import pattern_of
from ..obs import InverseFactor, inverse_factor
from ..settings import MethodSettings
from . import autoround_layer, awq_layer, llm_int8, quik_layer, smoothquant_layer
from .activations import asks_for_largest, rounding_inputs
from .gptq import gptq
from .grids import expected_on_grid, grid_misfit, grid_of, has_common_scale, largest_of_all
from .hqq import hqq_grid
from .obq import obq
from .outlier_methods import expect_gobo, expect_spqr, gobo, spqr, spqr_factor, spqr_note
from .rtn import rtn
from .settings import Gptq, Hqq, OnGrid, QuantizeSettings, Rtn
from .settings_autoround import AutoRound
from .settings_awq import Awq
from .settings_llm_int8 import LlmInt8
from .settings_obq import Obq
from .settings_outliers import Gobo, Spqr
from .settings_quik import Quik
from .settings_smoothquant import SmoothQuant
from .vector_methods import FALLBACK as VECTOR_FALLBACK
from .vector_methods import METHODS as VECTOR_METHODS


def _rtn(task: LayerTask) -> CompressedWeight:
    return _stored(task, rtn(task.weight, grid_of(task)))


def _hqq(task: LayerTask) -> CompressedWeight:
    settings: Hqq = task.settings
    rows, columns = task.weight.shape
    search = settings.model_dump(include={"norm", "beta", "kappa", "steps"})
    return rtn(
        task.weight,
        hqq_grid(task.weight, bits=settings.bits, tile=settings.tile((rows, columns)), dtype=task.dtype, **search),
    )


def _factor(hessian: Tensor, settings: Gptq | Obq) -> InverseFactor:
    order = settings.order if isinstance(settings, Gptq) else "activation"  # by which the clip search weighs columns
    return inverse_factor(hessian, damping=settings.damping, max_damping=settings.max_damping, order=order)


def _gptq(task: LayerTask) -> CompressedWeight:
    grid = grid_of(task, task.prepared.importance())
    return _stored(task, gptq(task.weight, task.prepared, grid, block_size=task.settings.block_size, kept=task.kept))


def _obq(task: LayerTask) -> CompressedWeight:
    grid = grid_of(task, task.prepared.importance())
    return _stored(task, obq(task.weight, task.prepared.inverse(), grid, kept=task.kept))


def _gptq_note(prepared: InverseFactor, settings: Gptq | Obq) -> str | None:
    return prepared.note(settings.damping, "are rounded to nearest")


def _stored(task: LayerTask, made: CompressedWeight) -> CompressedWeight:
    """What was pruned before stays pruned."""
    if task.kept is None:
        return made
    assert isinstance(made, Affine), "the plan has refused tables for what is pruned"
    return Sparse.of_affine(made, task.kept, pattern=pattern_of(task.kept))


def _expect(current: CompressedWeight, settings: QuantizeSettings, dtype: torch.dtype) -> CompressedWeight | str:
    """Codes instead of a plain matrix, of what is left of a sparse one, of each plain factor of a low-rank one."""
    if isinstance(current, LowRank):
        sides = [_expect(side, settings, dtype) for side in (current.left, current.right)]
        wrong = next((side for side in sides if isinstance(side, str)), None)
        if wrong is not None:
            return f"of a factor, {wrong}"
        left, right = sides
        assert isinstance(left, Factor)
        assert isinstance(right, Factor)
        return LowRank(left, right)
    if not isinstance(current, Dense | Sparse) or (isinstance(current, Sparse) and current.scales is not None):
        told = (
            "quantized"
            if isinstance(current, Affine | Bilevel | Codebook | Float | Sparse | VectorCodebook | WithOutliers)
            else f"stored as {current.kind.replace('_', '-')}"
        )
        return f"it is {told} already"
    misfit = grid_misfit(settings, current.shape)
    if misfit:
        return misfit
    if not isinstance(settings, OnGrid) or settings.grid != "int":
        if isinstance(current, Sparse):
            values = f"the grid {settings.grid}" if isinstance(settings, OnGrid) else settings.method
            return f"it is pruned, and with {values} it would not stay sparse: take rtn or gptq on the grid int"
        return expected_on_grid(settings, dtype, current.shape)
    grid = grid_meta(settings.bits, settings.group_size, settings.symmetric, shape=current.shape)
    meta: dict[str, Any] = {"shape": list(current.shape), "dtype": dtype_name(dtype), **grid}
    if isinstance(current, Sparse):
        return Sparse.empty({**meta, "pattern": current.pattern, "nnz": current.count})
    return Affine.empty(meta)


def _unpruned(current: CompressedWeight, settings: QuantizeSettings, dtype: torch.dtype) -> CompressedWeight | str:
    """What `_expect` says, of plain matrices alone: what is stored sparse can't take scales."""
    if isinstance(current, Dense):
        return _expect(current, settings, dtype)
    if isinstance(current, Sparse) and current.scales is None:
        return f"it is pruned, and {settings.method} takes plain matrices: take rtn or gptq"
    if isinstance(current, LowRank):
        return f"it is a product of factors, and {settings.method} takes plain matrices: take rtn or gptq"
    return _expect(current, settings, dtype)


def _plainer(settings: QuantizeSettings) -> Rtn:
    return Rtn(**settings.model_dump(include=set(Rtn.model_fields) - {"method"}))


def _along_columns(settings: Hqq) -> Hqq:
    """For a table: its rows are of one token each, and how many there are suits no group."""
    return settings.model_copy(update={"group_along": "columns"})


def _fed(compress: Callable[[LayerTask], CompressedWeight]) -> LayerMethod:
    """A method on any grid that makes up for errors by the Hessian of the inputs."""
    return rounding_inputs(
        LayerMethod(
            compress=compress,
            expect=_expect,
            statistic="hessian",
            prepare=_factor,
            survey=largest_of_all,
            is_surveyed=has_common_scale,
            note=_gptq_note,
        )
    )


METHODS: Final[Mapping[type[MethodSettings], LayerMethod]] = MappingProxyType(
    {
        Rtn: rounding_inputs(
            LayerMethod(compress=_rtn, expect=_expect, survey=largest_of_all, is_surveyed=has_common_scale)
        ),
        Hqq: LayerMethod(compress=_hqq, expect=_expect),
        Gobo: LayerMethod(compress=gobo, expect=expect_gobo),
        Awq: rounding_inputs(
            LayerMethod(
                compress=awq_layer.compress,
                expect=_unpruned,
                statistic="hessian",
                prepare=awq_layer.prepare,
                survey=largest_of_all,
                is_surveyed=has_common_scale,
                note=awq_layer.note,
                scaling=awq_layer.SCALING,
            )
        ),
        Gptq: _fed(_gptq),
        Spqr: LayerMethod(compress=spqr, expect=expect_spqr, statistic="hessian", prepare=spqr_factor, note=spqr_note),
        Obq: _fed(_obq),
        AutoRound: LayerMethod(
            compress=autoround_layer.compress,
            expect=autoround_layer.expect,
            statistic="block",
            tune=autoround_layer.tune,
        ),
        SmoothQuant: LayerMethod(
            compress=smoothquant_layer.compress,
            expect=smoothquant_layer.expect,
            asks_for_largest=asks_for_largest,
            scaling=smoothquant_layer.SCALING,
        ),
        Quik: LayerMethod(
            compress=quik_layer.compress,
            expect=quik_layer.expect,
            statistic="hessian",
            prepare_ranged=quik_layer.prepare,
            asks_for_largest=lambda settings: True,
            note=quik_layer.note,
        ),
        LlmInt8: LayerMethod(compress=llm_int8.compress, expect=llm_int8.expect),
        **VECTOR_METHODS,
    }
)

FALLBACK: Final[Mapping[type[MethodSettings], Callable[[Any], MethodSettings]]] = MappingProxyType(
    {
        Gptq: _plainer,
        Awq: _plainer,
        Spqr: _plainer,
        Obq: _plainer,
        AutoRound: _plainer,
        Quik: _plainer,
        **VECTOR_FALLBACK,
    }
)
"""What is done instead of a method where it doesn't serve: settings -> plainer settings."""

ON_TABLES: Final[Mapping[type[MethodSettings], Callable[[Any], MethodSettings]]] = MappingProxyType(
    {Hqq: _along_columns}
)
"""What a method that serves everywhere does otherwise with a table of embeddings: settings -> settings that suit it."""
