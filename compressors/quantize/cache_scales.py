"""Scales for what a model caches: from the sizes of keys or values to the range of their codes.

A key or value is stored as its code times a scale that is known before the text is: the static quantization of
activations of Nagel et al. 2021, "A White Paper on Neural Network Quantization", sections 2.2 and 3.1. Floats take the
largest number that was seen to the highest code. Of integers the range is the one with the least squared error (the
same section), found on a histogram of sizes, so that the text runs through the model once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from modelzip.weights.kv_cache import CacheScheme

BINS: Final = 8192
"""Of a histogram, whose end is at most twice the largest size: of 8-bit codes, each has 32 or more."""

RATIOS: Final = tuple(1 - step / 100 for step in range(91))
"""Ranges that are tried, as shares of the largest size, the whole of it first."""


@dataclass(frozen=True)
class Sizes:
    """What was seen: of each head the largest |x|, and how many were of which size.

    largest: [heads]. ends: [heads], powers of two, 0 where nothing but zeros was seen. counts: [heads, BINS], of sizes
    in equal parts of 0 to the end. All in fp64 and on the CPU; counts are whole, so the order of batches changes
    nothing.
    """

    largest: Tensor
    ends: Tensor
    counts: Tensor

    @classmethod
    def none(cls, heads: int) -> Sizes:
        """Of nothing seen yet."""
        zeros = torch.zeros(heads, dtype=torch.float64)
        return cls(zeros, zeros.clone(), torch.zeros(heads, BINS, dtype=torch.float64))

    def and_of(self, x: Tensor) -> Sizes:
        """These and those of x [heads, numbers]."""
        sizes = x.detach().abs().float()
        largest = torch.maximum(self.largest, sizes.amax(1).cpu().double())
        ends = torch.maximum(self.ends, _power_of_two(largest))
        steps = torch.where(ends > 0, ends / BINS, 1.0).float().to(x.device)
        place = (sizes / steps[:, None]).long().clamp_(max=BINS - 1)
        place += BINS * torch.arange(len(place), device=x.device)[:, None]
        counts = torch.bincount(place.flatten(), minlength=self.counts.numel()).cpu().double()
        return Sizes(largest, ends, self._counted_to(ends) + counts.reshape(self.counts.shape))

    def joined(self) -> Sizes:
        """Those of all heads as of one."""
        end = self.ends.max()
        counts = self._counted_to(end.expand(len(self.ends)))
        return Sizes(self.largest.max()[None], end[None], counts.sum(0, keepdim=True))

    def _counted_to(self, ends: Tensor) -> Tensor:
        """The counts with other ends, which are no lower."""
        made = []
        for counts, old, new in zip(self.counts, self.ends.tolist(), ends.tolist(), strict=True):
            parts = 1 if old == new else BINS if old == 0 else min(round(new / old), BINS)
            merged = counts.reshape(-1, parts).sum(1)
            made.append(torch.cat([merged, merged.new_zeros(BINS - len(merged))]))
        return torch.stack(made)


def _power_of_two(largest: Tensor) -> Tensor:
    """The least power of two above each, 0 for 0."""
    return torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.double()), 0.0)


def cache_scales(sizes: Sizes, scheme: CacheScheme) -> Tensor:
    """The scale of each head, fp64 [heads]; 1 for heads of nothing but zeros, which any scale keeps."""
    ratios = (1.0,) if scheme.codes == "fp8" else RATIOS
    tried = sizes.largest[:, None] * torch.tensor(ratios, dtype=torch.float64) / scheme.highest
    tried = torch.where(tried > 0, tried, 1.0)
    error = torch.stack([squared_error(sizes, scales, scheme) for scales in tried.T], dim=1)
    return tried.gather(1, error.argmin(1, keepdim=True))[:, 0]


def squared_error(sizes: Sizes, scales: Tensor, scheme: CacheScheme) -> Tensor:
    """The sum of the squared differences of all numbers from what their codes stand for, [heads]. scales: [heads]."""
    middles = _middles(sizes)
    return (sizes.counts * (middles - scheme.rounded(middles, scales[:, None])) ** 2).sum(1)


def squares(sizes: Sizes) -> Tensor:
    """The sum of the squares of all numbers, [heads]."""
    return (sizes.counts * _middles(sizes) ** 2).sum(1)


def _middles(sizes: Sizes) -> Tensor:
    return (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS * sizes.ends[:, None]
