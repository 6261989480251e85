"""The factorizations that work matrix by matrix, each as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.compressors.layer import LayerMethod, LayerTask, UnsuitableError
from modelzip.weights.dense import Dense
from modelzip.weights.kronecker import Kronecker as KroneckerWeight
from modelzip.weights.low_rank import LowRank
from modelzip.weights.sparse import Sparse
from modelzip.weights.tensor_train import TensorTrain as TensorTrainWeight
from modelzip.weights.value import CompressedWeight

from .kronecker import kronecker, shapes, sides
from .settings import FactorizeSettings, Kronecker, Svd, SvdLlm, TensorTrain
from .spectrum import chosen_rank
from .svd import svd
from .svd_llm import Whitening, svd_llm, whitening
from .tensor_train import paired_modes, planned_ranks, tensor_train


def low_rank(factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> LowRank:
    """left [out, rank] and right [rank, in] as they are stored."""
    left, right = (Dense(factor.to(dtype).contiguous()) for factor in factors)
    return LowRank(left, right)


def _svd(task: LayerTask) -> CompressedWeight:
    return _cheaper(low_rank(svd(task.weight, task.settings), task.dtype), task)


def _svd_llm(task: LayerTask) -> CompressedWeight:
    return _cheaper(low_rank(svd_llm(task.weight, task.prepared, task.settings), task.dtype), task)


def _kronecker(task: LayerTask) -> CompressedWeight:
    a, b = (factor.to(task.dtype).contiguous() for factor in kronecker(task.weight, task.settings))
    return _cheaper(KroneckerWeight(a, b), task)


def _tensor_train(task: LayerTask) -> CompressedWeight:
    cores = tensor_train(task.weight, task.settings)
    return _cheaper(TensorTrainWeight(tuple(core.to(task.dtype).contiguous() for core in cores)), task)


def _expect_low_rank(current: CompressedWeight, settings: FactorizeSettings, dtype: torch.dtype) -> LowRank | str:
    rows, columns = current.shape
    rank = min(chosen_rank(settings, current.shape), rows, columns)
    return low_rank((_meta(rows, rank, dtype=dtype), _meta(rank, columns, dtype=dtype)), dtype)


def _expect_kronecker(current: CompressedWeight, settings: Kronecker, dtype: torch.dtype) -> KroneckerWeight | str:
    """At its largest: which of the shapes it will be depends on the values."""
    try:
        tried = shapes(current.shape, settings)
    except UnsuitableError as reason:
        return str(reason)
    made = []
    for rows, columns in tried:
        size = sides(current.shape, (rows, columns))
        terms = min(chosen_rank(settings, size), *size)
        a = _meta(terms, rows, columns, dtype=dtype)
        b = _meta(terms, current.shape[0] // rows, current.shape[1] // columns, dtype=dtype)
        made.append(KroneckerWeight(a, b))
    return max(made, key=lambda weight: weight.nbytes)


def _expect_tensor_train(
    current: CompressedWeight, settings: TensorTrain, dtype: torch.dtype
) -> TensorTrainWeight | str:
    ends = (1, *planned_ranks(current.shape, settings), 1)
    pairs = paired_modes(current.shape, settings.dims)
    return TensorTrainWeight(tuple(_meta(ends[k], m, n, ends[k + 1], dtype=dtype) for k, (m, n) in enumerate(pairs)))


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _cheaper(made: CompressedWeight, task: LayerTask) -> CompressedWeight:
    """The weight, if it costs less than the dense one in the same dtype. Raises UnsuitableError."""
    reason = _too_dear(made, task.weight.numel() * task.dtype.itemsize)
    if reason is not None:
        raise UnsuitableError(reason)
    return made


def _too_dear(made: CompressedWeight, dense_bytes: int) -> str | None:
    if made.nbytes < dense_bytes:
        return None
    return f"its factors would take {made.nbytes:,} bytes and it takes {dense_bytes:,} dense"


def _unfit(current: CompressedWeight) -> str | None:
    """Why a matrix as it is now can't be replaced by factors, or None."""
    if isinstance(current, Sparse):
        return "an earlier stage has pruned it, and factors would not keep its zeros"
    if not isinstance(current, Dense):
        return f"an earlier stage has compressed it already ({current.kind.replace('_', ' ')})"
    return None


def _method(
    compress: Callable[[LayerTask], CompressedWeight],
    expect: Callable[[CompressedWeight, Any, torch.dtype], CompressedWeight | str],
) -> LayerMethod:
    """A method whose matrices must be dense so far, and whose factors must cost less."""

    def expect_cheaper(current: CompressedWeight, settings: Any, dtype: torch.dtype) -> CompressedWeight | str:
        unfit = _unfit(current)
        made = unfit if unfit is not None else expect(current, settings, dtype)
        if isinstance(made, str):
            return made
        return _too_dear(made, current.shape[0] * current.shape[1] * dtype.itemsize) or made

    return LayerMethod(compress=compress, expect=expect_cheaper)


def _whitening(hessian: Tensor, settings: SvdLlm) -> Whitening:
    return whitening(hessian, damping=settings.damping, max_damping=settings.max_damping)


def _whitening_note(prepared: Whitening, settings: SvdLlm) -> str | None:
    notes = []
    if prepared.damping > settings.damping:
        notes.append(f"the Hessian needed damping {prepared.damping:.3g}")
    if prepared.dead:
        notes.append(f"{prepared.dead} input columns were never active and count for little in the factors")
    return "; ".join(notes) or None


METHODS: Final[Mapping[type[FactorizeSettings], LayerMethod]] = MappingProxyType(
    {
        Svd: _method(_svd, _expect_low_rank),
        SvdLlm: replace(
            _method(_svd_llm, _expect_low_rank), statistic="hessian", prepare=_whitening, note=_whitening_note
        ),
        Kronecker: _method(_kronecker, _expect_kronecker),
        TensorTrain: _method(_tensor_train, _expect_tensor_train),
    }
)
