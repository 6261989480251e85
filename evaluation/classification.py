"""Figures of classifiers: accuracies with their confidence intervals, and how alike two classifiers answer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .agreement import divergence_figures

Z_95 = 1.959964
"""Quantile of the standard normal distribution that leaves 2.5 % above it."""


def wilson(right: int, count: int, *, z: float = Z_95) -> tuple[float, float]:
    """The score interval of a share: `right` of `count` independent trials. Both ends lie in 0 to 1.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference". Raises ValueError without any
    trial.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"{right} of {count} is no share")
    p, n = right / count, count
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half if right else 0.0, middle + half if right < count else 1.0  # exact, where rounding isn't


def classified(original: Tensor | None, compressed: Tensor, labels: Tensor) -> dict[str, Any]:
    """The report's figures for logits [examples, classes] of both models over the same examples.

    labels: int64 [examples]. The divergences are KL(original ‖ compressed) of the class distributions, in nats.
    """
    if original is None:
        return {"accuracy": accuracy(None, compressed, labels), **divergence_figures(None), "top1_agreement": None}
    p, q = original.double().log_softmax(-1), compressed.double().log_softmax(-1)
    return {
        "accuracy": accuracy(original, compressed, labels),
        **divergence_figures((p.exp() * (p - q)).sum(-1)),
        "top1_agreement": float((original.argmax(-1) == compressed.argmax(-1)).double().mean()),
    }


def accuracy(original: Tensor | None, compressed: Tensor, labels: Tensor) -> dict[str, float | int | None]:
    """Shares of examples put into the right class, with 95 % intervals, and the examples that differ.

    lost, won: examples that only the original, and only the compressed model, puts into the right class. A NaN among
    an example's logits counts as wrong.
    """
    right = _right(compressed, labels)
    low, high = wilson(int(right.sum()), len(labels))
    found: dict[str, float | int | None] = {"compressed": float(right.double().mean()), "low": low, "high": high}
    if original is None:
        return found | dict.fromkeys(("original", "original_low", "original_high", "lost", "won"))
    was_right = _right(original, labels)
    low, high = wilson(int(was_right.sum()), len(labels))
    return found | {
        "original": float(was_right.double().mean()),
        "original_low": low,
        "original_high": high,
        "lost": int((was_right & ~right).sum()),
        "won": int((right & ~was_right).sum()),
    }


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels) & ~torch.isnan(logits).any(-1)
