"""Tables of values between -1 and 1 that are the same for every matrix: NormalFloat, AbnormalFloat, 4-bit floats."""

from __future__ import annotations

import math
from functools import cache
from typing import Final

import torch
from torch import Tensor

E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the 4-bit float of OCP's "Microscaling Formats (MX) Specification", 2023, table 5."""


def normal_float(bits: int) -> Tensor:
    """NormalFloat, fp32 [2**bits], rising: quantiles of a normal distribution, with -1, 0 and 1 among them.

    Dettmers et al. 2023, "QLoRA", section 3 and appendix E: 2^(k-1) quantiles on one side of zero and 2^(k-1) + 1 on
    the other, evenly spaced in probability, from an outermost one that leaves as much beyond it as half a level.
    """
    half = 1 << (bits - 1)
    outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above = _quantiles(outermost, half + 1)
    below = -_quantiles(outermost, half)
    table = torch.cat([below[:-1], above.flip(0)])  # zero is in both
    return (table / table.abs().max()).float()


def _quantiles(outermost: float, count: int) -> Tensor:
    """Normal quantiles from that of `outermost` down to the median, which is 0."""
    shares = torch.linspace(outermost, 0.5, count, dtype=torch.float64)
    quantiles = math.sqrt(2) * torch.erfinv(2 * shares - 1)
    quantiles[-1] = 0
    return quantiles


@cache
def abnormal_float(bits: int, group_size: int) -> tuple[float, ...]:
    """AbnormalFloat, rising: the levels of least expected absolute error for normal weights that are divided by the
    largest of their group, with -1, 0 and 1 held.

    Yoshida 2023, "NF4 Isn't Information Theoretically Optimal (and that's Good)", section 4.2. Found by Lloyd's
    iteration for absolute errors, each level the median of what is nearest to it. The levels published for groups of
    64, which lie closer around zero, have a mean error 3.4 % above that of these: 0.0293 and 0.0283 of the largest.
    """
    values, shares = _of_group(group_size)
    half = 1 << (bits - 1)
    below = _medians(values, shares, half)
    above = _medians(values, shares, half + 1)
    return tuple((-below).flip(0).tolist()[:-1] + above.tolist())


def _of_group(group_size: int, points: int = 1 << 13) -> tuple[Tensor, Tensor]:
    """Magnitudes below 1 of weights over the largest of their group, and the density there, up to a factor.

    With m the largest of n normal magnitudes, another one is t m with density E[m φ(t m) / (2Φ(m) - 1)].
    """
    m = torch.linspace(1e-3, 9, 1 << 11, dtype=torch.float64)
    inside = torch.erf(m / math.sqrt(2))
    largest = group_size * inside ** (group_size - 1) * torch.exp(-m.square() / 2)
    values = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    density = torch.cat(
        [
            (largest * m / inside * torch.exp(-(part[:, None] * m).square() / 2)).sum(-1)
            for part in torch.split(values, 1 << 10)
        ]
    )
    return values, density


def _medians(values: Tensor, shares: Tensor, count: int) -> Tensor:
    """Levels [count] from 0 to 1, both held, the others medians of their cells; values are rising."""
    total = shares.cumsum(0)
    levels = torch.linspace(0, 1, count, dtype=torch.float64)
    for _ in range(2000):
        edges = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        reached = torch.cat([total.new_zeros(1), total])[edges]
        medians = values[torch.searchsorted(total, (reached[1:] + reached[:-1]) / 2).clamp(max=len(values) - 1)]
        if torch.equal(medians, levels[1:-1]):
            break
        levels[1:-1] = medians
    return levels


def small_float() -> Tensor:
    """The 4-bit float E2M1 over its largest value, fp32 [16], rising; zero is there twice, as in the format."""
    magnitudes = torch.tensor(E2M1) / E2M1[-1]
    return torch.cat([-magnitudes.flip(0), magnitudes])
