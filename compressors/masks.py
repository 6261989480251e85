"""Masks: which entries of a matrix are kept. Of equal scores every function here keeps the earlier one."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

Pattern: TypeAlias = tuple[int, int]
"""(n, m): n kept of each m in a row."""

PATTERNS: Final[tuple[Pattern, ...]] = ((2, 4), (4, 8))


def without_smallest(scores: Tensor, lost: int, kept: Tensor | None = None) -> Tensor:
    """False for the `lost` smallest scores of each row of scores [rows, n], none of which is negative.

    Entries outside kept (bool [rows, n]) stay lost and count as lost; a row that has lost more already loses no others.
    """
    if kept is not None:
        scores = scores.masked_fill(~kept, -1)
    if lost == 0:
        return torch.ones_like(scores, dtype=torch.bool) if kept is None else kept.clone()
    threshold = _smallest(scores, lost)
    mask = scores > threshold
    spared = (scores.shape[-1] - lost) - mask.count_nonzero(-1).unsqueeze(-1)
    if bool(spared.any()):
        ties = scores == threshold
        mask |= ties & (ties.cumsum(-1) <= spared)
    return mask if kept is None else mask.logical_and_(kept)


def without_smallest_of_all(scores: Tensor, lost: int, kept: Tensor | None = None) -> Tensor:
    """The same with all entries of scores [out, in] compared with each other."""
    flat = without_smallest(scores.reshape(1, -1), lost, None if kept is None else kept.reshape(1, -1))
    return flat.reshape(scores.shape)


def largest_of_groups(scores: Tensor, pattern: Pattern, kept: Tensor | None = None) -> Tensor:
    """True for the n largest scores of each m in a row of scores [out, in], as far as they are in `kept`."""
    most, wide = pattern
    groups = None if kept is None else kept.reshape(-1, wide)
    return without_smallest(scores.reshape(-1, wide), wide - most, groups).reshape(scores.shape)


def pattern_of(kept: Tensor) -> Pattern | None:
    """The first pattern that kept [out, in] follows in every group, with neither more entries nor fewer."""
    for most, wide in PATTERNS:
        if kept.shape[1] % wide == 0 and bool((kept.reshape(-1, wide).sum(1) == most).all()):
            return most, wide
    return None


def _smallest(scores: Tensor, place: int) -> Tensor:
    """The `place`-th smallest of each row of scores [rows, n]: [rows, 1]."""
    if scores.device.type != "cpu":
        return scores.kthvalue(place, dim=-1, keepdim=True).values
    parted = np.partition(scores.numpy(), place - 1, axis=-1)  # ten times as fast as torch's on a CPU
    return torch.from_numpy(parted[:, place - 1 : place])
