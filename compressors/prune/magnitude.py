"""Magnitude pruning: the smallest weights become zero.

Han, Pool, Tran, Dally 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3, without
the retraining. Over many matrices the common threshold is found in one walk over them, with a count for each of the
sizes that the upper bits of a float tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import without_smallest_of_all

DROPPED_BITS = 12
"""Bits of a float that the count leaves out: 11 bits of the fraction stay, all that bf16 and fp16 have."""

SIZES = 1 << (31 - DROPPED_BITS)
"""Sizes that are told apart; each spans 1 / 2048 of itself."""


@dataclass(frozen=True)
class Threshold:
    """Weights of a size (see `size_of`) below `size` become zero, and this `share` of those that have it."""

    size: int
    share: float


def size_of(weight: Tensor) -> Tensor:
    """The sizes of the entries of weight, fp32: int32 in their order, 0 ... SIZES - 1."""
    return weight.abs().view(torch.int32).bitwise_right_shift_(DROPPED_BITS)


def count_sizes(weight: Tensor) -> Tensor:
    """How many entries of weight, fp32, have each size: int64 [SIZES]."""
    return size_of(weight).reshape(-1).bincount(minlength=SIZES).cpu()


def common_threshold(counts: Tensor, sparsity: float) -> Threshold:
    """The threshold under which a share `sparsity` of all entries lies, from the sum of `count_sizes` over matrices.

    Of bf16 and fp16 checkpoints it is exact. Of fp32 ones, weights within 1 / 2048 of it are told apart inside each
    matrix only.
    """
    reached = counts.cumsum(0)
    lost = round(sparsity * int(reached[-1]))
    size = int(torch.searchsorted(reached, lost))
    below = int(reached[size] - counts[size])
    return Threshold(size, (lost - below) / max(1, int(counts[size])))


def under_threshold(weight: Tensor, threshold: Threshold, kept: Tensor | None) -> Tensor:
    """bool [out, in]: what of weight [out, in] is kept. Of the entries at the threshold the smallest go."""
    sizes = size_of(weight)
    lost = int((sizes < threshold.size).count_nonzero())
    lost += round(threshold.share * int((sizes == threshold.size).count_nonzero()))
    return without_smallest_of_all(weight.abs(), lost, kept)
