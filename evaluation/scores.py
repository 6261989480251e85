"""Figures of GLUE-style tasks beside accuracy, each with its 95 % interval: F1, Matthews', and correlations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .classification import Z_95

RESAMPLES = 2000
"""Of the examples, for the intervals of F1 and Matthews' coefficient."""

Counts: TypeAlias = NDArray[np.float64]
Score: TypeAlias = dict[str, float | None]


def class_scores(original: Tensor | None, compressed: Tensor, labels: Tensor) -> dict[str, Score]:
    """`f1` and `matthews` for logits [examples, classes] of both models; labels: int64 [examples].

    Intervals are percentiles of the bootstrap (Efron 1979): resampling examples with replacement draws the confusion
    matrix from a multinomial distribution, so that is drawn itself, from a fixed seed.
    """
    measured = (original, compressed)
    counts = [None if logits is None else confusion(logits, labels) for logits in measured]
    return {name: _row(counts, _bootstrapped(score)) for name, score in (("f1", f1), ("matthews", matthews))}


def number_scores(original: Tensor | None, compressed: Tensor, labels: Tensor) -> dict[str, Score]:
    """`pearson` and `spearman` between the models' numbers [examples] and labels [examples].

    Intervals by Fisher's z transform (Fisher 1921), of ranks with the variance of Bonett & Wright 2000.
    """

    def of(numbers: Tensor, *, ranked: bool) -> tuple[float, float | None, float | None]:
        both = [ranks(one) if ranked else one.double() for one in (numbers, labels)]
        r = float(torch.corrcoef(torch.stack(both))[0, 1])
        if len(labels) < 4 or math.isnan(r):
            return r, None, None
        spread = Z_95 * math.sqrt((1 + r * r / 2 if ranked else 1) / (len(labels) - 3))
        z = math.copysign(math.inf, r) if abs(r) >= 1 else math.atanh(r)
        return r, math.tanh(z - spread), math.tanh(z + spread)

    measured = (original, compressed)
    return {
        "pearson": _row(measured, lambda numbers: of(numbers, ranked=False)),
        "spearman": _row(measured, lambda numbers: of(numbers, ranked=True)),
    }


def confusion(logits: Tensor, labels: Tensor) -> Counts:
    """How often each class was taken for which, [classes, classes + 1]; the last column is of logits with a NaN."""
    classes = logits.shape[-1]
    said = torch.where(torch.isnan(logits).any(-1), classes, logits.argmax(-1))
    flat = torch.bincount(labels * (classes + 1) + said, minlength=classes * (classes + 1))
    return flat.view(classes, classes + 1).double().numpy()


def f1(counts: Counts) -> NDArray[np.float64]:
    """F1 of class 1 where there are two, as GLUE has it, else the mean over the classes that occur.

    counts: [..., classes, classes + 1] -> [...]. A class that is neither there nor said has no F1; without any, 0.
    """
    classes = counts.shape[-2]
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    both = counts.sum(-1) + counts.sum(-2)[..., :classes]
    each = np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)
    if classes == 2:
        return np.asarray(each[..., 1])
    return np.asarray(each.sum(-1) / np.maximum((both > 0).sum(-1), 1))


def matthews(counts: Counts) -> NDArray[np.float64]:
    """Matthews' correlation coefficient, for any number of classes; 0 where a model says one class alone.

    counts: [..., classes, classes + 1] -> [...]. Gorodkin 2004, "Comparing two K-category assignments by a K-category
    correlation coefficient", equation 8.
    """
    classes = counts.shape[-2]
    right, total = np.trace(counts, axis1=-2, axis2=-1), counts.sum((-2, -1))
    there, said = counts.sum(-1), counts.sum(-2)
    above = right * total - (there * said[..., :classes]).sum(-1)
    below = np.sqrt((total**2 - (there**2).sum(-1)) * (total**2 - (said**2).sum(-1)))
    return np.asarray(np.divide(above, below, out=np.zeros_like(below), where=below > 0))


def _bootstrapped(
    score: Callable[[Counts], NDArray[np.float64]],
) -> Callable[[Counts], tuple[float, float | None, float | None]]:
    def of(counts: Counts) -> tuple[float, float | None, float | None]:
        total = int(counts.sum())
        drawn = np.random.default_rng(0).multinomial(total, counts.ravel() / total, size=RESAMPLES)
        low, high = np.quantile(score(drawn.reshape(RESAMPLES, *counts.shape).astype(np.float64)), (0.025, 0.975))
        return float(score(counts)), float(low), float(high)

    return of


def _row(measured: Any, score: Callable[[Any], tuple[float, float | None, float | None]]) -> Score:
    original, compressed = (None if one is None else score(one) for one in measured)
    assert compressed is not None
    before = original or (None, None, None)
    return dict(zip(("original", "original_low", "original_high"), before, strict=True)) | dict(
        zip(("compressed", "low", "high"), compressed, strict=True)
    )


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties at the mean of theirs."""
    _, places, counts = np.unique(values.double().numpy(), return_inverse=True, return_counts=True)
    return torch.from_numpy((counts.cumsum() - (counts - 1) / 2)[places])
