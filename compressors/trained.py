"""Methods that put a module of their own in place of each linear, train it, and freeze it to a compressed weight.

Each as the training engine sees it: what a matrix will be, the module that learns it, and the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from modelzip.weights.affine import Affine
from modelzip.weights.dense import Dense
from modelzip.weights.scales import GroupScales
from modelzip.weights.sparse import Sparse
from modelzip.weights.value import CompressedWeight, dtype_name

from .distill.lsq import LsqLinear, lsq_start
from .distill.settings_students import Lsq
from .expected import grid_meta, group_misfit
from .prune.masked import MaskedLinear
from .prune.movement import MovementLinear, top_kept
from .prune.settings_training import GradualMagnitude, Lottery, Movement, PruneTrainingSettings
from .quantize.grid import AffineGrid, fit_grid
from .quantize.rtn import rtn
from .settings import MethodSettings


@dataclass(frozen=True)
class TrainedMethod:
    """expect: (weight now, settings, entries that it will keep, dtype of stored values) -> what it will be, on the meta
    device, or a part of a sentence that says why the method can't take it.
    mount: (weight now, bias, settings, what it will be) -> the module that is trained; its parameters are fp32.
    freeze: (the module's tensors by name, settings, what it was to be) -> what it has become.
    rates: the module's parameters beside weight and bias, which get no weight decay, with the setting that holds their
    learning rate; None: the common one.
    """

    expect: Callable[[CompressedWeight, Any, int, torch.dtype], CompressedWeight | str]
    mount: Callable[[CompressedWeight, Tensor | None, Any, CompressedWeight], nn.Module]
    freeze: Callable[[Mapping[str, Tensor], Any, CompressedWeight], CompressedWeight]
    rates: Mapping[str, str | None]


def entries_kept(weights: Sequence[CompressedWeight], settings: MethodSettings) -> list[int]:
    """How many entries each matrix keeps; where they compete over all matrices, its share by size of what all keep."""
    sizes = [weight.shape[0] * weight.shape[1] for weight in weights]
    left = [weight.count if isinstance(weight, Sparse) else size for weight, size in zip(weights, sizes, strict=True)]
    if not isinstance(settings, PruneTrainingSettings):
        return left
    sparsity = settings.sparsity
    if getattr(settings, "scope", "local") == "local":
        return [min(most, size - round(sparsity * size)) for most, size in zip(left, sizes, strict=True)]
    total = min(sum(left), sum(sizes) - round(sparsity * sum(sizes)))
    ends = [total * sum(left[:place]) // max(sum(left), 1) for place in range(len(left) + 1)]
    return [end - start for start, end in pairwise(ends)]


def _expect_sparse(
    current: CompressedWeight, settings: PruneTrainingSettings, count: int, dtype: torch.dtype
) -> CompressedWeight | str:
    if isinstance(current, Sparse) and current.scales is not None:
        return "its kept weights are quantized already; prune before quantizing"
    if not isinstance(current, Dense | Sparse):
        return f"it is {current.kind.replace('_', '-')} already; prune before that"
    if isinstance(current, Sparse) and isinstance(settings, Movement):
        return "it is sparse already, and scores would bring pruned weights back; take gradual-magnitude"
    pattern = current.pattern if isinstance(current, Sparse) and count == current.count else None
    shape = list(current.shape)
    return Sparse.empty(
        {"kind": Sparse.kind, "shape": shape, "pattern": pattern, "nnz": count, "dtype": dtype_name(dtype)}
    )


def _dense(value: CompressedWeight) -> tuple[Tensor, Tensor | None]:
    """The matrix fp32 [out, in], and which entries a sparse one keeps."""
    return value.dense(torch.float32), value.kept if isinstance(value, Sparse) else None


def _mount_masked(value: CompressedWeight, bias: Tensor | None, settings: Any, wanted: CompressedWeight) -> nn.Module:
    weight, kept = _dense(value)
    return MaskedLinear(weight, bias, kept=kept, dtype=wanted.dtype)


def _freeze_masked(tensors: Mapping[str, Tensor], settings: Any, wanted: CompressedWeight) -> Sparse:
    return _sparse(tensors["weight"], tensors["kept"], wanted)


def _mount_movement(
    value: CompressedWeight, bias: Tensor | None, settings: Movement, wanted: CompressedWeight
) -> nn.Module:
    weight, _ = _dense(value)
    return MovementLinear(weight, bias, masking=settings.masking, threshold=settings.threshold, dtype=wanted.dtype)


def _freeze_movement(tensors: Mapping[str, Tensor], settings: Movement, wanted: CompressedWeight) -> Sparse:
    scores = tensors["scores"]
    is_top = settings.masking == "top"
    return _sparse(
        tensors["weight"], top_kept(scores, settings.sparsity) if is_top else scores > settings.threshold, wanted
    )


def _sparse(weight: Tensor, kept: Tensor, wanted: CompressedWeight) -> Sparse:
    assert isinstance(wanted, Sparse)
    return Sparse.of_dense(weight, kept, pattern=wanted.pattern, dtype=wanted.dtype)


def _expect_lsq(current: CompressedWeight, settings: Lsq, count: int, dtype: torch.dtype) -> CompressedWeight | str:
    """A dense or sparse matrix gets a grid; one that has a grid keeps it, and only what lies on it is learned."""
    if not isinstance(current, Dense | Sparse | Affine):
        return f"it is {current.kind.replace('_', '-')} already; quantize before that"
    grid = _grid_of(current)
    if grid is not None:
        return _other_grid(grid, settings) or current
    if misfit := group_misfit(settings.group_size, current.shape[1]):
        return misfit
    meta = current.meta() if isinstance(current, Sparse) else {"kind": Affine.kind, "shape": list(current.shape)}
    meta |= grid_meta(settings.bits, settings.group_size, settings.symmetric, shape=current.shape)
    meta["dtype"] = dtype_name(dtype)
    return Sparse.empty(meta) if isinstance(current, Sparse) else Affine.empty(meta)


def _grid_of(weight: CompressedWeight) -> GroupScales | None:
    return weight.scales if isinstance(weight, Affine | Sparse) else None


def _other_grid(grid: GroupScales, settings: Lsq) -> str | None:
    """What was asked for of the grid and isn't so in the one that came in, a part of a sentence."""
    asked = grid_meta(settings.bits, settings.group_size, settings.symmetric, shape=grid.shape)
    has = grid.meta()
    for field in ("bits", "group_size", "symmetric"):
        is_default = getattr(settings, field) == Lsq.model_fields[field].default
        if not is_default and asked[field] != has[field]:
            return f"it is on a grid already, with {field} {has[field]}, which is learned from there; leave out {field}"
    return None


def _mount_lsq(value: CompressedWeight, bias: Tensor | None, settings: Lsq, wanted: CompressedWeight) -> nn.Module:
    weight, kept = _dense(value)
    grid = _grid_of(value)
    pattern = value.pattern if isinstance(value, Sparse) else None
    if isinstance(value, Affine):
        start = value
    elif grid is not None:
        zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
        start = rtn(
            weight,
            AffineGrid(grid.scale.float(), zero_point.float(), grid.bits, grid.zero_point is None, grid.scale.dtype),
        )
    else:
        start = _first_grid(weight, settings, wanted.dtype)
    return LsqLinear(weight, start, bias, kept=kept, pattern=pattern)


def _first_grid(weight: Tensor, settings: Lsq, dtype: torch.dtype) -> Affine:
    sizes = {"tensor": None, "channel": weight.shape[1]}
    size = settings.group_size if isinstance(settings.group_size, int) else sizes[settings.group_size]
    if settings.start == "mean" and size is not None:
        return lsq_start(weight, bits=settings.bits, group_size=size, dtype=dtype)
    if settings.start == "mean":
        whole = lsq_start(weight.reshape(1, -1), bits=settings.bits, group_size=weight.numel(), dtype=dtype)
        grid = AffineGrid(whole.scale.float(), torch.zeros(1, 1), settings.bits, True, dtype)
        return rtn(weight, grid)
    return rtn(
        weight,
        fit_grid(weight, bits=settings.bits, group_size=size, symmetric=settings.symmetric, clip="mse", dtype=dtype),
    )


def _freeze_lsq(tensors: Mapping[str, Tensor], settings: Lsq, wanted: CompressedWeight) -> CompressedWeight:
    grid = _grid_of(wanted)
    assert grid is not None
    step, zero_point = tensors["step"], tensors.get("zero_point")
    whole = None if zero_point is None else zero_point.to(torch.int8)
    start = Affine(torch.empty(0), step.to(grid.scale.dtype), whole, grid.bits, wanted.shape)
    pattern = wanted.pattern if isinstance(wanted, Sparse) else None
    module = LsqLinear(tensors["weight"], start, kept=tensors.get("kept"), pattern=pattern)
    # In full precision, as it was trained: the start above holds them as they are stored.
    module.step = nn.Parameter(step)
    module.zero_point = None if zero_point is None else nn.Parameter(zero_point)
    return module.freeze()


_MASKED: Final = TrainedMethod(_expect_sparse, _mount_masked, _freeze_masked, MappingProxyType({}))

TRAINED: Final[Mapping[type[MethodSettings], TrainedMethod]] = MappingProxyType(
    {
        GradualMagnitude: _MASKED,
        Lottery: _MASKED,
        Movement: TrainedMethod(
            _expect_sparse, _mount_movement, _freeze_movement, MappingProxyType({"scores": "score_rate"})
        ),
        Lsq: TrainedMethod(_expect_lsq, _mount_lsq, _freeze_lsq, MappingProxyType({"step": None, "zero_point": None})),
    }
)
"""By the class of their settings; methods that train the weights as they are have no entry."""
