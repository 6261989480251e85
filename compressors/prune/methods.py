"""The pruners, each as the engine sees it: which statistic it needs, and a few functions of plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from modelzip.weights.dense import Dense
from modelzip.weights.sparse import Sparse
from modelzip.weights.value import CompressedWeight, dtype_name

from ..expected import grid_meta, group_misfit
from ..layer import LayerMethod, LayerTask, UnsuitableError
from ..masks import largest_of_groups, pattern_of, without_smallest, without_smallest_of_all
from ..obs import InverseFactor, inverse_factor
from ..quantize.grid import AffineGrid, chosen_grid
from ..quantize.rtn import rtn
from ..settings import MethodSettings
from .magnitude import Threshold, common_threshold, count_sizes, under_threshold
from .settings import Magnitude, PruneSettings, Random, SparseGpt, Wanda
from .sparsegpt import foreseen, sparsegpt

Thresholds: TypeAlias = Mapping[Magnitude, Threshold]


def _random(task: LayerTask) -> Sparse:
    scores = torch.rand(task.weight.shape, generator=task.generator, device=task.generator.device)
    return _masked(task, _cheapest(task, scores.to(task.weight.device)))


def _magnitude(task: LayerTask) -> Sparse:
    thresholds: Thresholds = task.surveyed or {}
    if task.settings.scope == "global" and task.settings in thresholds:
        return _masked(task, under_threshold(task.weight, thresholds[task.settings], task.kept))
    return _masked(task, _cheapest(task, task.weight.abs()))


def _is_global(settings: Magnitude) -> bool:
    return settings.scope == "global"


def _thresholds(weights: Iterator[tuple[Any, Tensor]]) -> Thresholds:
    """A threshold for each settings of global scope, over the matrices that have them."""
    counts: dict[Magnitude, Tensor] = {}
    for settings, weight in weights:
        if isinstance(settings, Magnitude) and settings.scope == "global":
            found = count_sizes(weight)
            counts[settings] = counts[settings].add_(found) if settings in counts else found
    return {settings: common_threshold(found, float(settings.sparsity)) for settings, found in counts.items()}


def _norms(squares: Tensor, settings: Wanda) -> Tensor:
    """The norm of each input up to a factor that all share, [in]."""
    if not torch.isfinite(squares).all():
        raise UnsuitableError("the mean square of an input isn't finite: an activation overflowed")
    return squares.sqrt()


def _wanda(task: LayerTask) -> Sparse:
    """Sun et al. 2023, equation 1: |W_ij| ‖X_j‖, compared within each row, or each group of an n:m pattern."""
    scores = task.weight.abs() * task.prepared
    if task.settings.pattern:
        return _masked(task, largest_of_groups(scores, task.settings.pattern, task.kept))
    return _masked(task, without_smallest(scores, round(task.settings.sparsity * scores.shape[1]), task.kept))


def _factor(hessian: Tensor, settings: SparseGpt) -> InverseFactor:
    together = settings.pattern[1] if settings.pattern else 1
    return inverse_factor(
        hessian,
        damping=settings.damping,
        max_damping=settings.max_damping,
        order=settings.columns_order,
        together=together,
    )


def _sparsegpt(task: LayerTask) -> Sparse:
    settings, factor = task.settings, task.prepared
    sparsity = settings.pattern or settings.sparsity
    grid = None
    if settings.bits:
        kept = foreseen(task.weight, factor, sparsity, task.kept)
        grid = _fitted(task.weight.masked_fill(~kept, 0), settings, task.dtype, factor.importance())
    written, kept = sparsegpt(
        task.weight,
        factor,
        sparsity,
        value_dtype=task.dtype,
        grid=grid,
        kept=task.kept,
        threshold=settings.threshold,
        block_size=settings.block_size,
    )
    pattern = settings.pattern or (None if task.kept is None else pattern_of(kept))
    if grid is None:
        return Sparse.of_dense(written, kept, pattern=pattern, dtype=task.dtype)
    return Sparse.of_affine(grid.weight(written), kept, pattern=pattern)


def _note(prepared: InverseFactor, settings: SparseGpt) -> str | None:
    return prepared.note(settings.damping, "compete as if of mean size")


def _cheapest(task: LayerTask, scores: Tensor) -> Tensor:
    """Which entries are kept if those of the smallest scores of the whole matrix go, or of each group of a pattern."""
    if task.settings.pattern:
        return largest_of_groups(scores, task.settings.pattern, task.kept)
    return without_smallest_of_all(scores, round(task.settings.sparsity * scores.numel()), task.kept)


def _masked(task: LayerTask, kept: Tensor) -> Sparse:
    """The kept entries as they are, or each rounded to its group's grid."""
    pattern = task.settings.pattern or (None if task.kept is None else pattern_of(kept))
    if task.settings.bits is None:
        return Sparse.of_dense(task.weight, kept, pattern=pattern, dtype=task.dtype)
    weight = task.weight.masked_fill(~kept, 0)
    return Sparse.of_affine(rtn(weight, _fitted(weight, task.settings, task.dtype)), kept, pattern=pattern)


def _fitted(
    weight: Tensor, settings: PruneSettings, dtype: torch.dtype, importance: Tensor | None = None
) -> AffineGrid:
    """The grid of a weight whose lost entries are 0, which lies on every grid: so only the others count."""
    assert settings.bits is not None
    return chosen_grid(weight, settings, bits=settings.bits, dtype=dtype, importance=importance)


def _expect(current: CompressedWeight, settings: PruneSettings, dtype: torch.dtype) -> CompressedWeight | str:
    """What pruning makes of a plain matrix, or of one that is sparse already."""
    if isinstance(current, Sparse) and current.scales is not None:
        return "its kept weights are quantized already; prune before quantizing"
    if not isinstance(current, Dense | Sparse):
        return f"it is {current.kind.replace('_', '-')} already; prune before that"
    rows, columns = current.shape
    if settings.pattern and columns % settings.pattern[1]:
        return f"{settings.sparsity} takes columns by {settings.pattern[1]}, and it has {columns}"
    misfit = group_misfit(settings.group_size, columns) if settings.bits else None
    if misfit:
        return misfit
    pattern, count = settings.pattern, _most_kept(settings, rows, columns)
    if isinstance(current, Sparse):
        count = min(count, current.count)
        pattern = pattern or (current.pattern if count == current.count else None)
    meta = {"kind": "sparse", "shape": [rows, columns], "pattern": pattern, "nnz": count, "dtype": dtype_name(dtype)}
    if settings.bits:
        meta |= grid_meta(settings.bits, settings.group_size, settings.symmetric, shape=current.shape)
    return Sparse.empty(meta)


def _most_kept(settings: PruneSettings, rows: int, columns: int) -> int:
    """Entries that a matrix keeps; one of a global threshold may keep all, but all together keep their share."""
    if settings.pattern:
        return rows * columns // settings.pattern[1] * settings.pattern[0]
    if isinstance(settings, Wanda):
        return rows * (columns - round(float(settings.sparsity) * columns))
    return rows * columns - round(float(settings.sparsity) * rows * columns)


def _plainer(settings: PruneSettings) -> Magnitude:
    return Magnitude(**settings.model_dump(include=set(PruneSettings.model_fields) - {"method"}))


METHODS: Final[Mapping[type[MethodSettings], LayerMethod]] = MappingProxyType(
    {
        Random: LayerMethod(compress=_random, expect=_expect),
        Magnitude: LayerMethod(compress=_magnitude, expect=_expect, survey=_thresholds, is_surveyed=_is_global),
        Wanda: LayerMethod(compress=_wanda, expect=_expect, statistic="squares", prepare=_norms),
        SparseGpt: LayerMethod(compress=_sparsegpt, expect=_expect, statistic="hessian", prepare=_factor, note=_note),
    }
)

FALLBACK: Final[Mapping[type[MethodSettings], Callable[[Any], MethodSettings]]] = MappingProxyType(
    {Wanda: _plainer, SparseGpt: _plainer}
)
"""What is done instead of a method where it doesn't serve: settings -> plainer settings."""
