"""A layer-wise method as the engine sees it: which statistic it needs, and a few functions of plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from modelzip.weights.value import CompressedWeight

StatisticKind: TypeAlias = Literal["none", "squares", "hessian", "block"]


class UnsuitableError(ArithmeticError):
    """A method finds that it can't serve this matrix; the text is a part of a sentence that says why."""


@dataclass(frozen=True)
class LayerTask:
    """One matrix to be compressed.

    weight: fp32 [out, in]. prepared: what the method's `prepare` made of the statistic, None without one.
    surveyed: what its `survey` found over all matrices, None without one. dtype: of stored values and scales.
    kept: bool [out, in], False where an earlier stage has set an entry to zero for good; None if it did nowhere.
    generator: for what is drawn by chance, seeded from the recipe's seed and the module's name. largest: of |x| over
    the calibration tokens, fp32 [in]; None if the method doesn't ask for it, or no token reaches the matrix.
    """

    weight: Tensor
    settings: Any
    dtype: torch.dtype
    generator: torch.Generator
    prepared: Any = None
    surveyed: Any = None
    kept: Tensor | None = None
    largest: Tensor | None = None


@dataclass(frozen=True)
class BlockTask:
    """The matrices of one block, to be compressed together.

    tasks: of each matrix that calibration tokens reach, by name. batches: how many batches of inputs the block has.
    loss: of a batch's number and matrices [out, in] in place of those of the tasks, the mean squared error of the
    block's output for that batch against what the original block makes of it; differentiable in the matrices.
    generator: for what is drawn by chance.
    """

    tasks: Mapping[str, LayerTask]
    batches: int
    loss: Callable[[int, Mapping[str, Tensor]], Tensor]
    generator: torch.Generator


@dataclass(frozen=True)
class BlockMade:
    """weights: of all matrices of a task. note: for the report."""

    weights: Mapping[str, CompressedWeight]
    note: str


@dataclass(frozen=True)
class ScaleTask:
    """Linears with one input, whose entries may be divided by scales that the module before them takes.

    matrices: the settings of each and its weight, fp32 [out, in]. mean_magnitude, largest: of |x| over the calibration
    tokens of the original model, as they stand along the producer's output: the mean or the largest of those that share
    an entry. hessian: the mean of x xᵀ, [in, in]; None if it isn't asked for. spread: scales of the producer's output
    as they stand along the input, [in].
    """

    matrices: tuple[tuple[Any, Tensor], ...]
    mean_magnitude: Tensor
    largest: Tensor
    hessian: Tensor | None
    spread: Callable[[Tensor], Tensor]
    dtype: torch.dtype


@dataclass(frozen=True)
class Scales:
    """values: what each entry of the producer's output is divided by, positive. note: for the report."""

    values: Tensor
    note: str


@dataclass(frozen=True)
class Scaling:
    """How a method chooses scales before it compresses. makers: what the scales may be folded into: `norm`,
    `value` (the value projection before attention's output) or `product` (a gated feed-forward's multiplied branch)."""

    choose: Callable[[ScaleTask], Scales]
    makers: frozenset[str]
    needs_hessian: bool


@dataclass(frozen=True)
class LayerMethod:
    """A method that compresses one matrix at a time, or, with `tune`, all those of a block together.

    statistic: of the inputs x over the calibration tokens; "squares": the mean of x², [in]; "hessian": the mean of
    x xᵀ, [in, in]; "block": none, but the inputs of whole blocks, for `tune`. prepare: what linears with the same
    input share, made from the statistic once, whatever the bits; may raise UnsuitableError.
    prepare_ranged: the same of a method that always asks for the largest |x|, from the statistic and these, [in].
    compress: the compressed weight; may raise UnsuitableError. expect: from what a matrix is now (on the meta device),
    settings and the dtype of stored values, what it will become, on the meta device and at its largest if that depends
    on values, or a part of a sentence that says why the method can't take it.
    survey: looks at all matrices (settings, weight) of a stage once before the first is compressed. is_surveyed: of
    which settings they are; all without.
    asks_for_largest: of which settings the largest |x| are gathered beside the statistic.
    note: what the report says of a preparation that isn't the ordinary one, or None. scaling: scales of the inputs that
    are chosen for the original model and folded into the modules before, None for methods that have none.
    tune: compresses the matrices of a block together; all of its settings that aren't of single matrices are the
    stage's. Such a method takes plain matrices that serve one module each.
    """

    compress: Callable[[LayerTask], CompressedWeight]
    expect: Callable[[CompressedWeight, Any, torch.dtype], CompressedWeight | str]
    statistic: StatisticKind = "none"
    prepare: Callable[[Tensor, Any], Any] | None = None
    prepare_ranged: Callable[[Tensor, Tensor, Any], Any] | None = None
    survey: Callable[[Iterator[tuple[Any, Tensor]]], Any] | None = None
    is_surveyed: Callable[[Any], bool] | None = None
    asks_for_largest: Callable[[Any], bool] | None = None
    note: Callable[[Any, Any], str | None] | None = None
    scaling: Scaling | None = None
    tune: Callable[[BlockTask], BlockMade] | None = None
