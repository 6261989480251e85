"""The symmetric update in plain torch: panels of columns, on and under the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 128
"""Columns of a panel. Wider ones run faster and compute more than is needed."""

CAST_TOKENS = 1024
"""Tokens that are cast to fp32 at once. More take more memory and no less time."""


def add_second_moment(total: Tensor, rows: Tensor) -> None:
    width = total.shape[0]
    for part in torch.split(rows, CAST_TOKENS):
        x = part.to(total.dtype)
        for start in range(0, width, PANEL):
            stop = min(start + PANEL, width)
            total[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
